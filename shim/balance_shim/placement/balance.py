"""Mode `balanced`: the device map with the lowest fill of the fullest device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations, product

from ..device import Device
from ..map_file import DeviceMap
from ..memory.cost import BlockCost
from ..memory.peak import NOTHING, RunPeaks, merged
from .chain import Chain, EndGroup, Link, chain_of
from .costed_model import CostedModel, lower_bound
from .plan import evaluate
from .solver import least_fill, partition

# A crossing more costs time in each step, so that it must bring the fullest device down by this part at least.
WORTH_A_CROSSING = 0.005
# Split towers are where cross-device errors of vision-language models come from.
WORTH_A_SPLIT = 0.02
# Scripts expect the embedding where inputs arrive: they feed it themselves, and PEFT's prompt encoders are concatenated
# with its output. It is elsewhere only where that brings the fullest device down by this part at least.
WORTH_LEAVING_FIRST_DEVICE = 0.05
MOST_WORK = 100_000  # layouts tried x links in the row: about a second
_IN_ROW = -1


class DoesNotFit(Exception):
    """The weights alone exceed the memory of the devices; bytes."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class _Layout:
    """One way to set up the row: the devices in the order in which it passes them, and where each group sits.

    `places` has for each group the index of its device in `devices`, or `_IN_ROW`.
    """

    devices: tuple[Device, ...]
    places: tuple[int, ...]


def balance(costed: CostedModel, devices: Sequence[Device]) -> DeviceMap:
    """Return the best map found with the embedding on the first device, unless leaving is worth it.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    entry = costed.structure.entry
    if entry <= costed.constraints.on_first or (costed.head_device is not None and _is_tied_to_head(costed, entry)):
        return _best(costed, devices)
    try:
        on_first_device = _best(replace(costed, constraints=costed.constraints.with_met(entry | {None})), devices)
    except DoesNotFit:
        return _best(costed, devices)
    fill = _fill(costed, on_first_device, devices)
    least = lower_bound(costed, devices) / max(device.capacity for device in devices)
    if fill <= 1 and least > fill * (1 - WORTH_LEAVING_FIRST_DEVICE):
        return on_first_device  # no map is that much better
    anywhere = _best(costed, devices)
    other = _fill(costed, anywhere, devices)
    return anywhere if other <= fill * (1 - WORTH_LEAVING_FIRST_DEVICE) or other <= 1 < fill else on_first_device


def _is_tied_to_head(costed: CostedModel, names: frozenset[str]) -> bool:
    """Whether one of the blocks `names` has to be where the head is, whose device another model decides."""
    head = costed.structure.named("head")
    held = [
        {name for block in costed.blocks if block.name in block_names for name in (block.name, *block.tensors)}
        for block_names in (names, head)
    ]
    return any(
        all(group & members for members in held) for group in (*costed.structure.ties, *costed.constraints.groups)
    )


def _fill(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> float:
    return evaluate("balanced", costed, device_map, devices).worst.filled


def _best(costed: CostedModel, devices: Sequence[Device]) -> DeviceMap:
    """Return the best map found: layers in a row that passes each device once, embedding, tower and head anywhere.

    For each order of devices and place of the groups that is tried, no other map has a lower worst fill fraction.
    The head is on `costed.head_device`, unless the model fits only if it is elsewhere.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    if costed.head_device is None:
        return _balanced(costed, devices)
    free = replace(costed, head_device=None)
    if costed.head_device not in {device.index for device in devices}:
        return _balanced(free, devices)
    try:
        together = _balanced(costed, devices)
    except DoesNotFit:
        return _balanced(free, devices)
    if not evaluate("balanced", costed, together, devices).shortfall:
        return together
    elsewhere = _balanced(free, devices)
    return together if evaluate("balanced", free, elsewhere, devices).shortfall else elsewhere


def _balanced(costed: CostedModel, devices: Sequence[Device]) -> DeviceMap:
    least = lower_bound(costed, devices) / max(device.capacity for device in devices)
    chain, split = (chain_of(costed, whole_tower) for whole_tower in (True, False))
    device_map, fill = _solve(chain, costed.first, devices, least)
    if len(split.links) > len(chain.links) and fill > least * (1 + WORTH_A_SPLIT):
        other, other_fill = _solve(split, costed.first, devices, least)
        if other_fill < fill * (1 - WORTH_A_SPLIT):
            device_map = other
    if not _weights_fit(costed, device_map, devices):
        # The prediction is over capacity everywhere; what can still be had is that everything loads.
        weights = tuple(BlockCost(weights=cost.weights) for cost in costed.costs)
        bare = chain_of(replace(costed, costs=weights), whole_tower=False)
        bare_devices = [replace(device, capacity=device.holds_weights, overhead=0) for device in devices]
        device_map, _ = _solve(bare, NOTHING, bare_devices)
        if not _weights_fit(costed, device_map, devices):
            needed = sum(cost.weights for cost in costed.costs)
            raise DoesNotFit(needed, sum(device.holds_weights for device in devices))
    return _starting_on({block.name: device_map[block.name] for block in costed.blocks}, devices[0].index)


def _starting_on(device_map: DeviceMap, first_device: int) -> DeviceMap:
    """Return the map with something on the first device in front.

    Up to 1.10 at least, accelerate has inputs arrive where the first entry is.
    """
    front = next((name for name, place in device_map.items() if place == first_device), None)
    return device_map if front is None else {front: first_device, **device_map}


def _solve(chain: Chain, first: BlockCost, devices: Sequence[Device], least: float = 0) -> tuple[DeviceMap, float]:
    """Return the map of the best layout, and the fill fraction of its fullest device.

    `least` is a fill fraction that none can go below: close to it is enough.
    """
    best: _Layout | None = None
    worst: float | None = None
    most = MOST_WORK // len(chain.links)
    problems = _Problems(chain, first, devices[0])
    for layout in islice(_layouts(chain.groups, tuple(devices)), max(1, most)):
        loads, capacities, blocks = problems.of(layout)
        target = None if worst is None else worst * (1 - WORTH_A_CROSSING)
        fill, cuts = least_fill(loads, capacities, blocks, below=target)
        if cuts is not None:
            best, worst = layout, fill
            if fill <= least * (1 + WORTH_A_CROSSING):
                break
    assert best is not None and worst is not None, "the first layout is always solved"
    loads, capacities, blocks = problems.of(best)
    cuts = partition(loads, capacities, blocks)
    row = chain.without(_apart(chain.groups, best))
    device_map = DeviceMap(_places(row, cuts, best.devices))
    for group, place in zip(chain.groups, best.places, strict=True):
        if place != _IN_ROW:
            links = (*group.ahead, *group.behind)
            device_map.update({block.name: best.devices[place].index for link in links for block in link.blocks})
    return device_map, worst


def _layouts(groups: Sequence[EndGroup], devices: tuple[Device, ...]) -> Iterator[_Layout]:
    """Yield layouts, the plainest first: devices in their own order, groups in the row where they may be."""
    for order in _orders(devices):
        first_device = order.index(devices[0])
        choices = [_choices(group, first_device, [device.index for device in order]) for group in groups]
        combinations = sorted(product(*choices), key=lambda places: sum(place != _IN_ROW for place in places))
        yield from (_Layout(order, places) for places in combinations)


def _choices(group: EndGroup, first_device: int, indices: Sequence[int]) -> list[int]:
    """Return the places that `group` may have; see `_Layout`."""
    if group.pinned:
        return [first_device]
    if group.device is not None:
        return [indices.index(group.device)]
    anywhere = list(range(len(indices)))
    return anywhere if group.must_leave else [_IN_ROW, *anywhere]


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


def _apart(groups: Sequence[EndGroup], layout: _Layout) -> list[EndGroup]:
    return [group for group, place in zip(groups, layout.places, strict=True) if place != _IN_ROW]


class _Problems:
    """The solver's inputs for each layout. Layouts share the loads of devices that hold the same groups apart."""

    def __init__(self, chain: Chain, first: BlockCost, first_device: Device) -> None:
        self._chain, self._first, self._first_device = chain, first, first_device
        self._rows: dict[frozenset[int], list[BlockCost]] = {}
        self._loads: dict[tuple[frozenset[int], tuple[int, ...], int, bool], RunPeaks] = {}

    def of(self, layout: _Layout) -> tuple[list[RunPeaks], list[float], int]:
        """Return (loads, capacities, number of links in the row)."""
        apart = frozenset(group for group, place in enumerate(layout.places) if place != _IN_ROW)
        if apart not in self._rows:
            self._rows[apart] = [link.cost for link in self._chain.without(_apart(self._chain.groups, layout))]
        loads = []
        for position, device in enumerate(layout.devices):
            groups_here = tuple(group for group, place in enumerate(layout.places) if place == position)
            key = apart, groups_here, device.overhead, device is self._first_device
            if key not in self._loads:
                self._loads[key] = RunPeaks(self._rows[apart], self._chain.schedule, *self._beside(groups_here, device))
            loads.append(self._loads[key])
        return loads, [float(device.capacity) for device in layout.devices], len(self._rows[apart])

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


def _weights_fit(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> bool:
    held = {device.index: 0 for device in devices}
    for block, cost in zip(costed.blocks, costed.costs, strict=True):
        held[int(device_map[block.name])] += cost.weights
    return all(held[device.index] <= device.holds_weights for device in devices)
