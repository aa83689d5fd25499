"""Ways to lay a chain out on devices (their order; where embedding, tower and head sit), and the best of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations, product
from typing import NamedTuple, Protocol

from ..device import Device
from ..map_file import DeviceMap
from ..memory.cost import BlockCost
from ..memory.peak import RunPeaks, merged
from .chain import Chain, EndGroup, Link
from .solver import Loads, least_fill, partition

# A crossing more costs time in each step, so that it must bring the fullest device down by this part at least.
WORTH_A_CROSSING = 0.005
MOST_WORK = 100_000  # layouts tried x links in the row: about a second
IN_ROW = -1


@dataclass(frozen=True)
class Layout:
    """One way to set up the row: the devices in the order in which it passes them, and where each group sits.

    `places` has for each group the index of its device in `devices`, or `IN_ROW`.
    """

    devices: tuple[Device, ...]
    places: tuple[int, ...]


class Problem(NamedTuple):
    """The solver's input for one layout.

    Attributes:
        loads: of each device, in the order of the layout.
        capacities: in the unit of the loads.
        links: how many links the row has.
    """

    loads: Sequence[Loads]
    capacities: Sequence[float]
    links: int


class Problems(Protocol):
    """What is to be balanced: memory, or time."""

    def of(self, layout: Layout) -> Problem | None:
        """Return the solver's input for `layout`; None for one that is not to be tried."""


def solve(
    chain: Chain, problems: Problems, devices: Sequence[Device], least: float = 0, below: float | None = None
) -> tuple[DeviceMap, float] | None:
    """Return the map of the best layout, and the fill fraction of its fullest device.

    Args:
        least: a fill fraction that none can go below: close to it is enough.
        below: a fraction that has to be beaten; None comes back where it cannot be. It has to be given where a layout
            may have no partition at all.
    """
    best: Layout | None = None
    solved: Problem | None = None
    worst = below
    for layout in islice(_layouts(chain.groups, tuple(devices)), max(1, MOST_WORK // len(chain.links))):
        problem = problems.of(layout)
        if problem is None:
            continue
        target = worst if best is None or worst is None else worst * (1 - WORTH_A_CROSSING)
        fill, cuts = least_fill(*problem, below=target)
        if cuts is not None:
            best, solved, worst = layout, problem, fill
            if fill <= least * (1 + WORTH_A_CROSSING):
                break
    if best is None or solved is None or worst is None:
        return None
    cuts = partition(*solved)
    row = chain.without(groups_apart(chain.groups, best))
    device_map = DeviceMap(_places(row, cuts, best.devices))
    for group, place in zip(chain.groups, best.places, strict=True):
        if place != IN_ROW:
            group_links = (*group.ahead, *group.behind)
            device_map.update({block.name: best.devices[place].index for link in group_links for block in link.blocks})
    return device_map, worst


def _layouts(groups: Sequence[EndGroup], devices: tuple[Device, ...]) -> Iterator[Layout]:
    """Yield layouts, the plainest first: devices in their own order, groups in the row where they may be."""
    for order in _orders(devices):
        first_device = order.index(devices[0])
        choices = [_choices(group, first_device, [device.index for device in order]) for group in groups]
        combinations = sorted(product(*choices), key=lambda places: sum(place != IN_ROW for place in places))
        yield from (Layout(order, places) for places in combinations)


def _choices(group: EndGroup, first_device: int, indices: Sequence[int]) -> list[int]:
    """Return the places that `group` may have; see `Layout`."""
    if group.pinned:
        return [first_device]
    if group.device is not None:
        return [indices.index(group.device)]
    anywhere = list(range(len(indices)))
    return anywhere if group.must_leave else [IN_ROW, *anywhere]


def _orders(devices: tuple[Device, ...]) -> Iterator[tuple[Device, ...]]:
    """Yield the orders of devices that differ: the given one first, then, where kinds are few, the rest."""
    yield devices
    if len({device.capacity for device in devices}) == 1 or len(devices) > 8:
        return
    tried = {tuple(_kind(device, devices) for device in devices)}
    for order in permutations(devices):
        kinds = tuple(_kind(device, devices) for device in order)
        if kinds not in tried:
            tried.add(kinds)
            yield order


def _kind(device: Device, devices: tuple[Device, ...]) -> tuple[int, int, bool]:
    return device.capacity, device.overhead, device is devices[0]


def groups_apart(groups: Sequence[EndGroup], layout: Layout) -> list[EndGroup]:
    """Return the groups that are not in the row."""
    return [group for group, place in zip(groups, layout.places, strict=True) if place != IN_ROW]


class MemoryProblems:
    """Bytes of each device against its capacity. Layouts share the loads of devices that hold the same groups apart."""

    def __init__(self, chain: Chain, first: BlockCost, first_device: Device) -> None:
        self._chain, self._first, self._first_device = chain, first, first_device
        self._rows: dict[frozenset[int], list[BlockCost]] = {}
        self._loads: dict[tuple[frozenset[int], tuple[int, ...], int, bool], RunPeaks] = {}

    def of(self, layout: Layout) -> Problem:
        """Return the solver's input for `layout`."""
        apart = frozenset(group for group, place in enumerate(layout.places) if place != IN_ROW)
        if apart not in self._rows:
            self._rows[apart] = [link.cost for link in self._chain.without(groups_apart(self._chain.groups, layout))]
        loads = []
        for position, device in enumerate(layout.devices):
            groups_here = tuple(group for group, place in enumerate(layout.places) if place == position)
            key = apart, groups_here, device.overhead, device is self._first_device
            if key not in self._loads:
                self._loads[key] = RunPeaks(self._rows[apart], self._chain.schedule, *self._beside(groups_here, device))
            loads.append(self._loads[key])
        return Problem(loads, [float(device.capacity) for device in layout.devices], len(self._rows[apart]))

    def _beside(self, groups_here: tuple[int, ...], device: Device) -> tuple[BlockCost, BlockCost]:
        """Return the costs on `device` ahead of its run and behind it: the groups there, and the runtime's overhead."""
        groups = [self._chain.groups[group] for group in groups_here]
        ahead = self._chain.merged([link for group in groups for link in group.ahead])
        behind = [link.cost for group in groups for link in group.behind]
        # Inputs arrive on the first device and outputs return to it.
        behind += [self._first] if device is self._first_device else []
        return replace(ahead, weights=ahead.weights + device.overhead), merged(behind, self._chain.schedule)


def _places(row: Sequence[Link], cuts: Sequence[int], devices: Sequence[Device]) -> Iterator[tuple[str, int]]:
    for device, start, stop in zip(devices, cuts, cuts[1:], strict=False):
        yield from ((block.name, device.index) for link in row[start:stop] for block in link.blocks)
