"""The predicted time of a training step of a plan."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..device import Device
from ..memory.cost import BlockCost
from ..memory.peak import Schedule
from ..timing.clock import step_time
from ..timing.measured import host_of
from ..timing.micro_batches import PlacedBlock, Step, time_of
from ..timing.rates import DeviceRates, HostRates, Operation
from ..timing.step_time import StepTime
from .costed_model import CostedModel
from .places import place_of

if TYPE_CHECKING:
    from ..memory.workload import Workload

# Bytes that a step of the optimizer moves, in multiples of what it has to: PyTorch's operations on lists of tensors
# (`foreach`) go through them once for each of their steps, a fused kernel once in all. AdamW's eight operations read
# and write 21 tensors of a parameter's size, its fused kernel 7 (torch/optim/adamw.py of 2.13).
FOREACH = 3
CLIPPING = (
    3  # gradients are read for their norm, read and written again: `max_grad_norm` is 1 unless it is switched off
)


def predict(
    costed: CostedModel,
    device_map: Mapping[str, int | str],
    devices: Sequence[Device],
    host: HostRates | None = None,
) -> StepTime | None:
    """Return the time of a step; None where the kind of a device is unknown, or not all of the model was traced."""
    rates = rates_of_all(devices)
    if rates is None or not costed.work.is_complete:
        return None
    homes = [place_of(block, device_map) for block in costed.blocks]
    # Without `BALANCE_PIPELINE` accelerate's hooks run the map.
    in_flight = costed.workload.in_flight if costed.workload.shares_inputs else 0
    step = step_of(costed, homes, devices, in_flight)
    if step is None:
        return None
    return step_time(time_of(step, rates, host or host_of(rates)), tokens_of(costed.workload), rates)


def step_of(
    costed: CostedModel, homes: Sequence[int | str], devices: Sequence[Device], in_flight: int = 0
) -> Step | None:
    """Return the step of a model with its blocks on the devices with these indices; None if one is on none of them."""
    positions = {device.index: position for position, device in enumerate(devices)}
    if any(home not in positions for home in homes) or costed.work.first is None:
        return None
    entries = sorted(
        (cost.rank, position, block.name, work, positions[home])  # type: ignore[index]  # checked above
        for position, (block, cost, work, home) in enumerate(
            zip(costed.blocks, costed.costs, costed.work.blocks, homes, strict=True)
        )
        if work is not None
    )
    blocks = tuple(PlacedBlock(name, work, device) for _, _, name, work, device in entries)
    on_device: list[list[BlockCost]] = [[] for _ in devices]
    for cost, home in zip(costed.costs, homes, strict=True):
        on_device[positions[home]].append(cost)  # type: ignore[index]
    updates = tuple(update_of(costs, costed.schedule) for costs in on_device)
    return Step(blocks, costed.work.first, updates, costed.workload.accumulation, in_flight)


def update_of(costs: Sequence[BlockCost], schedule: Schedule) -> Operation:
    """Return the time of clipping gradients and of the optimizer's step on these blocks."""
    gradients = sum(cost.gradients for cost in costs)
    state = sum(cost.optimizer for cost in costs)
    once = 2 * (gradients + state) + gradients  # weights are as wide as their gradients
    moved = once * (FOREACH if schedule.step_at_once else 1) + CLIPPING * gradients
    return Operation(0, moved)


def tokens_of(workload: "Workload") -> int:
    """Return the tokens of a step of one model."""
    return workload.tokens * workload.accumulation


def rates_of_all(devices: Sequence[Device]) -> list[DeviceRates] | None:
    """Return the rates of all devices; None if those of one are unknown."""
    rates = [device.rates for device in devices if device.rates is not None]
    return rates if len(rates) == len(devices) else None
