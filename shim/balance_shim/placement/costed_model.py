"""A model reduced to its structure and the cost of each block, and the least memory that any map of it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..device import Device
from ..memory.allocation_record import Record
from ..memory.blocks import Block
from ..memory.colocation import NO_CONSTRAINTS, Constraints
from ..memory.cost import BlockCost, CostSource
from ..memory.peak import NOTHING, PLAIN, Schedule, peak_terms
from ..memory.structure import ModelStructure
from ..memory.workload import Workload
from ..timing.work import NO_WORK, ModelWork


@dataclass(frozen=True)
class CostedModel:
    """A model reduced to its structure and the bytes of each block under a workload.

    Attributes:
        costs: in the order of the blocks.
        constraints: the blocks that must share a device, or be on the first one.
        first: bytes of inputs, and of outputs that return, on the first device.
        schedule: how the costs of a device combine.
        method: the source of the costs, for people.
        source: the same as data.
        math_attention: the types in which attention runs as plain matrix products.
        repeats_grouped_keys: whether keys and values are repeated for all heads, so that it does not.
        records: the allocations of each block in the order of the blocks; None for one that was not traced.
        first_record: those of `first`.
        unreached: the names of the blocks that no dry run has reached.
        evaluation_outputs: bytes of the model's outputs for a batch that is evaluated, without its loss.
        work: the operations and copies of each block in a micro-batch.
        head_device: index of the device where the head should be; see `compared_heads`. None: any.
    """

    structure: ModelStructure
    costs: tuple[BlockCost, ...]
    workload: Workload
    first: BlockCost = NOTHING
    schedule: Schedule = PLAIN
    method: str = ""
    source: CostSource = "trace"
    constraints: Constraints = NO_CONSTRAINTS
    math_attention: tuple[str, ...] = ()
    repeats_grouped_keys: bool = False
    records: tuple[Record | None, ...] = ()
    first_record: Record | None = None
    unreached: frozenset[str] = frozenset()
    evaluation_outputs: int = 0
    work: ModelWork = NO_WORK
    head_device: int | None = None

    def with_flights(self, in_flight: int, shares_inputs: bool) -> "CostedModel":
        """Return the costs, those of one micro-batch, as they combine with `in_flight` of them; see `Workload`."""
        workload = replace(self.workload, in_flight=in_flight, shares_inputs=shares_inputs)
        schedule = replace(
            self.schedule,
            in_flight=in_flight,
            in_chunks=workload.accumulation > in_flight,
            shares_inputs=shares_inputs,
        )
        return replace(self, workload=workload, schedule=schedule)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the model, in forward order."""
        return self.structure.blocks


def lower_bound(costed: CostedModel, devices: Sequence[Device]) -> int:
    """Return the bytes that the fullest device must hold at least, on the largest device where they differ.

    Under any map the devices together hold all weights and optimizer state, and at some time of the step, each on
    its own, all of their gradients or all of their activations. Some device holds the largest block; and of p n + 1
    blocks some of p devices holds n + 1. On one device there is but one map.
    """
    costs, schedule = costed.costs, costed.schedule
    if schedule.shares_inputs:
        everything = {tensor for cost in costs for tensor, _ in cost.takes}
        costs = tuple(cost.sharing(everything) for cost in costs)
    held = [cost.weights + cost.optimizer + schedule.buckets(cost.gradients) for cost in costs]
    at_the_step = [size + cost.gradients for size, cost in zip(held, costs, strict=True)]
    between_passes = [size + schedule.in_flight * cost.activations for size, cost in zip(held, costs, strict=True)]
    if schedule.has_gradients:
        between_passes = [size + cost.gradients for size, cost in zip(between_passes, costs, strict=True)]
    if schedule.step_at_once:
        at_the_step = [size + cost.step for size, cost in zip(at_the_step, costs, strict=True)]
    capacity, overhead = sum(device.capacity for device in devices), sum(device.overhead for device in devices)
    largest = max(device.capacity for device in devices)
    together = max(sum(at_the_step), sum(between_passes))
    bounds = [(together + overhead) / capacity * largest]
    bounds += [device.overhead / device.capacity * largest for device in devices]
    least_overhead = min(device.overhead for device in devices)
    bounds.append(max(sum(peak_terms([cost], schedule).values()) for cost in costs) + least_overhead)
    for sizes in (at_the_step, between_passes):
        every = sorted(sizes, reverse=True)[:: len(devices)]
        bounds += [number * size + least_overhead for number, size in enumerate(every, start=1)]
    if len(devices) == 1:
        bounds.append(sum(peak_terms([*costs, costed.first], schedule).values()) + overhead)
    return int(max(bounds))
