"""Maps for the time of a step: with micro-batches in flight, the stage that computes longest decides it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat

from ..device import Device
from ..language.message import Message
from ..map_file import DeviceMap
from ..timing.rates import DeviceRates
from ..timing.work import BlockWork
from .chain import Chain, EndGroup, Link, chain_of
from .costed_model import CostedModel
from .layouts import IN_ROW, Layout, MemoryProblems, Problem, groups_apart, solve
from .plan import Plan, evaluate
from .solver import Loads
from .step_time import rates_of_all, update_of

# Split towers are where cross-device errors of vision-language models come from.
WORTH_A_SPLIT = 0.02
# The map with the most free memory holds the longest sequences; a step has to be shorter by this part to give that up.
WORTH_THE_MEMORY = 0.02
# To shorten the step a device is filled up to the first of these parts of its capacity, or as far as the
# memory-balanced map fills one; to the second where the allocator would reserve too much.
ROOMS = (0.95, 0.85)
_ROUNDING = 1 + 1e-9


def shorter_step(costed: CostedModel, for_memory: DeviceMap, devices: Sequence[Device]) -> DeviceMap | None:
    """Return a map that fits, and whose step is shorter than that of the map with the lowest fill.

    Among the maps that fit with headroom, the one whose longest stage is the shortest; the clock then predicts the
    whole step, with transfers and the host.

    Args:
        costed: with the constraints that `for_memory` meets.
        for_memory: the map with the lowest fill of the fullest device.

    Returns:
        None if `for_memory` is to stay: one micro-batch at a time, a device of unknown kind, or a gain below
        `WORTH_THE_MEMORY`.
    """
    rates = rates_of_all(devices)
    if costed.workload.in_flight < 2 or not costed.workload.shares_inputs or rates is None:
        return None
    if len(devices) < 2 or not costed.work.is_complete:
        return None
    now = evaluate("balanced", costed, for_memory, devices)
    if now.shortfall or now.step_time is None:
        return None
    seconds = _Seconds(costed, devices, rates)
    for room in ROOMS:
        device_map = _shortest_stages(costed, devices, seconds, max(room, now.worst.filled))
        if device_map is None:
            return None
        plan = evaluate("balanced", costed, device_map, devices)
        if plan.step_time is None or plan.step_time.seconds > now.step_time.seconds * (1 - WORTH_THE_MEMORY):
            return None
        if not plan.shortfall:
            return device_map
    return None


def _shortest_stages(
    costed: CostedModel, devices: Sequence[Device], seconds: "_Seconds", room: float
) -> DeviceMap | None:
    """Return the map with the shortest longest stage; None where no map of stages in a row fits.

    Args:
        room: the part of each capacity that may be filled.
    """
    whole, split = (chain_of(costed, whole_tower) for whole_tower in (True, False))
    least = seconds.least()
    most = seconds.most()
    solution = solve(whole, _TimeProblems(whole, costed, devices, seconds, room), devices, least, most)
    if len(split.links) > len(whole.links):
        below = most if solution is None else solution[1] * (1 - WORTH_A_SPLIT)
        problems = _TimeProblems(split, costed, devices, seconds, room)
        solution = solve(split, problems, devices, least, below) or solution
    if solution is None:
        return None
    return {block.name: solution[0][block.name] for block in costed.blocks}


@dataclass(frozen=True)
class _Stage:
    """What a device computes in a step besides its run of the chain, and for each block; seconds."""

    first: float
    blocks: dict[str, float]


class _Seconds:
    """How long each device computes in a step, for any blocks on it: all passes, and the optimizer's step."""

    def __init__(self, costed: CostedModel, devices: Sequence[Device], rates: Sequence[DeviceRates]) -> None:
        assert costed.work.first is not None, "the whole model was traced"
        self._first_device = devices[0].index
        count = costed.workload.accumulation
        by_rates: dict[DeviceRates, _Stage] = {}
        for rate in rates:
            if rate not in by_rates:
                blocks = {
                    block.name: count * _of_passes(work, rate) + rate.seconds(update_of([cost], costed.schedule))
                    for block, cost, work in zip(costed.blocks, costed.costs, costed.work.blocks, strict=True)
                }
                by_rates[rate] = _Stage(count * _of_passes(costed.work.first, rate), blocks)
        self._stages = {device.index: by_rates[rate] for device, rate in zip(devices, rates, strict=True)}

    def of(self, device: Device, links: Sequence[Link]) -> list[float]:
        """Return the seconds of each link on `device`."""
        blocks = self._stages[device.index].blocks
        return [sum(blocks[block.name] for block in link.blocks) for link in links]

    def besides(self, device: Device) -> float:
        """Return the seconds on `device` that are of no block."""
        return self._stages[device.index].first if device.index == self._first_device else 0.0

    def most(self) -> float:
        """Return seconds that no stage comes to."""
        return 1.0 + sum(stage.first + sum(stage.blocks.values()) for stage in self._stages.values())

    def least(self) -> float:
        """Return seconds that no map's longest stage can go below."""
        stages = list(self._stages.values())
        fastest = [min(stage.blocks[name] for stage in stages) for name in stages[0].blocks]
        return max(sum(fastest) / len(stages), *fastest)


def _of_passes(work: BlockWork | None, rates: DeviceRates) -> float:
    return 0.0 if work is None else work.forward.seconds(rates) + work.backward.seconds(rates)


class _TimeProblems:
    """Seconds of each device, of partitions in which none is filled beyond a part of its capacity.

    Micro-batches pass each device once: where an embedding or a head is on the device of another stage, that one waits
    for a micro-batch to come round before it takes the next.
    """

    def __init__(
        self, chain: Chain, costed: CostedModel, devices: Sequence[Device], seconds: _Seconds, room: float
    ) -> None:
        self._chain, self._seconds, self._room = chain, seconds, room
        self._memory = MemoryProblems(chain, costed.first, devices[0])

    def of(self, layout: Layout) -> Problem | None:
        """Return the solver's input for `layout`; None if a micro-batch would come to a device twice."""
        if any(map(self._returns, self._chain.groups, layout.places, repeat(len(layout.devices) - 1))):
            return None
        memory = self._memory.of(layout)
        row = self._chain.without(groups_apart(self._chain.groups, layout))
        loads: list[Loads] = []
        for position, (device, bytes_of_runs) in enumerate(zip(layout.devices, memory.loads, strict=True)):
            groups = [
                group for group, place in zip(self._chain.groups, layout.places, strict=True) if place == position
            ]
            here = [link for group in groups for link in (*group.ahead, *group.behind)]
            besides = self._seconds.besides(device) + sum(self._seconds.of(device, here))
            most = self._room * device.capacity
            loads.append(_TimeWithin(bytes_of_runs, most, besides, self._seconds.of(device, row)))
        return Problem(loads, [1.0] * len(loads), memory.links)

    @staticmethod
    def _returns(group: EndGroup, place: int, last: int) -> bool:
        return (bool(group.ahead) and place not in (IN_ROW, 0)) or (bool(group.behind) and place not in (IN_ROW, last))


class _TimeWithin:
    """The seconds of runs; infinite where their bytes are above `most`: the solver's `Loads`."""

    def __init__(self, memory: Loads, most: float, besides: float, seconds: Sequence[float]) -> None:
        self._memory, self._most, self._besides = memory, most, besides
        self._sums = list(accumulate(seconds, initial=0.0))
        self._rows: dict[int, list[float]] = {}

    def row(self, start: int, limit: float) -> Sequence[float]:
        """Return the seconds with 0, 1, 2, ... links from `start` on, to the end of the chain."""
        if start not in self._rows:
            fitting = bisect_right(self._memory.row(start, self._most), self._most * _ROUNDING)
            self._rows[start] = [
                self._besides + total - self._sums[start] if count < fitting else float("inf")
                for count, total in enumerate(self._sums[start:])
            ]
        return self._rows[start]


def is_better(one: Plan, other: Plan) -> bool:
    """Return whether `one` is the better plan for a workload: by its step if that is pipelined, else by its memory."""
    fit = not one.shortfall and not other.shortfall
    if fit and one.workload.in_flight > 1 and one.step_time is not None and other.step_time is not None:
        return one.step_time.seconds < other.step_time.seconds
    return one.worst.filled < other.worst.filled


def noted(plan: Plan, costed: CostedModel, for_memory: DeviceMap, devices: Sequence[Device]) -> Plan:
    """Return `plan` with a note if its map differs from `for_memory` because its step is shorter."""
    if plan.workload.in_flight < 2 or plan.step_time is None or plan.device_map == for_memory:
        return plan
    other = evaluate("balanced", costed, for_memory, devices)
    if other.step_time is None or other.step_time.seconds <= plan.step_time.seconds:
        return plan
    note = Message(
        "map chosen for a short step; the memory-balanced map fills its fullest device to {part} and takes {seconds} s",
        part=f"{other.worst.filled:.0%}",
        seconds=f"{other.step_time.seconds:.3g}",
    )
    return replace(plan, notes=(*plan.notes, note))
