"""Correct the costs by measured peaks; memory that no block explains is assigned to its device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..device import Device
from ..map_file import DeviceMap
from ..memory.cost import BlockCost, Phase
from ..memory.peak import Schedule, peak
from .costed_model import CostedModel
from .places import device_of

LEAST, MOST = 0.1, 10.0  # bounds of measured over predicted activations; a difference beyond has another reason
AS_PREDICTED = 0.01  # of the measured peak: a prediction this close is not touched
PROBES = 40


def corrected(
    target: CostedModel,
    seen: CostedModel,
    device_map: DeviceMap,
    devices: Sequence[Device],
    measured: Mapping[int, int],
) -> tuple[CostedModel, tuple[Device, ...]]:
    """Return the costs of `target`, and the devices, such that they explain the measured peaks.

    Weights and optimizer state can be counted and are taken as they are. The rest of a device's peak is attributed to
    activations and temporaries: one factor a device, by which these terms of its blocks grow or shrink.

    Args:
        target: the costs to correct, for the micro-batch to plan for.
        seen: the costs of the same blocks for the micro-batch that was measured.
        device_map: where the blocks were then.
        devices: in index order.
        measured: device index -> the peak in bytes.
    """
    # Evaluations are not among the steps that were measured.
    seen = replace(seen, costs=tuple(cost.in_training() for cost in seen.costs), first=seen.first.in_training())
    costs = list(target.costs)
    calibrated = []
    for device in devices:
        positions = [
            place for place, block in enumerate(seen.blocks) if device_of(block.name, device_map) == device.index
        ]
        extra = [seen.first] if device is devices[0] else []
        goal = measured[device.index] - device.overhead
        kept, step = _factors([seen.costs[place] for place in positions], extra, seen.schedule, goal)
        for place in positions:
            costs[place] = scaled(costs[place], kept, step)
        explained = peak([*(scaled(seen.costs[place], kept, step) for place in positions), *extra], seen.schedule)
        unexplained = max(0, goal - explained) if goal - explained > AS_PREDICTED * goal else 0
        calibrated.append(replace(device, overhead=device.overhead + unexplained))
    return replace(target, costs=tuple(costs)), tuple(calibrated)


def _factors(
    costs: Sequence[BlockCost], extra: Sequence[BlockCost], schedule: Schedule, goal: int
) -> tuple[float, float]:
    """Return the factors of activations and of the optimizer's temporaries under which `goal` is the peak."""

    def with_factors(kept: float, step: float) -> int:
        return peak([*(scaled(cost, kept, step) for cost in costs), *extra], schedule)

    if abs(with_factors(1, 1) - goal) <= AS_PREDICTED * goal:
        return 1, 1
    step = 1.0
    if with_factors(0, 1) > goal:  # then the step has needed less than it was thought to
        step = _largest(lambda factor: with_factors(0, factor) <= goal, 0, 1)
    # A step above the need of the passes shows only that they need no more.
    most = MOST if with_factors(1, step) <= goal and step == 1 else 1
    return _largest(lambda factor: with_factors(factor, step) <= goal, LEAST, most), step


def _largest(allowed: Callable[[float], bool], low: float, high: float) -> float:
    """Return the largest factor in a range that is allowed, or `low`; below one that is allowed all are."""
    if allowed(high):
        return high
    for _ in range(PROBES):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def scaled(cost: BlockCost, kept: float, step: float) -> BlockCost:
    # The bytes of a block in its backward pass include its gradients, whose size is known.
    gradients = min(cost.gradients, cost.backward)
    return replace(
        cost,
        activations=int(cost.activations * kept),
        forward=int(cost.forward * kept),
        backward=gradients + int((cost.backward - gradients) * kept),
        step=int(cost.step * step),
        takes=tuple((tensor, int(size * kept)) for tensor, size in cost.takes),
        phases=tuple(_scaled(phase, kept, gradients) for phase in cost.phases),
    )


def _scaled(phase: Phase, factor: float, gradients: int) -> Phase:
    """Return `phase` with the share of its backward pass that may be `gradients` left as it is."""
    given_gradients = max(0, min(gradients, phase.backward))
    less = replace(phase, backward=phase.backward - given_gradients).scaled(factor)
    return replace(less, backward=less.backward + given_gradients)
