"""Mode `balanced`: the device map with the lowest fill of the fullest device, or the shortest step of a pipeline."""

from collections.abc import Sequence
from dataclasses import replace

from ..device import Device
from ..map_file import DeviceMap
from ..memory.cost import BlockCost
from ..memory.peak import NOTHING
from .chain import Chain, chain_of
from .costed_model import CostedModel, lower_bound
from .layouts import MemoryProblems, solve
from .plan import evaluate
from .timed_balance import WORTH_A_SPLIT, shorter_step

# Scripts expect the embedding where inputs arrive: they feed it themselves, and PEFT's prompt encoders are concatenated
# with its output. It is elsewhere only where that brings the fullest device down by this part at least.
WORTH_LEAVING_FIRST_DEVICE = 0.05


class DoesNotFit(Exception):
    """The weights alone exceed the memory of the devices; bytes."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available


def balance(costed: CostedModel, devices: Sequence[Device]) -> DeviceMap:
    """Return the best map found, for memory or, with several micro-batches in flight, for the time of a step.

    The embedding is on the first device, unless leaving it is worth it for memory.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    constrained, device_map = for_memory(costed, devices)
    shorter = shorter_step(constrained, device_map, devices)
    return device_map if shorter is None else _starting_on(shorter, devices[0].index)


def for_memory(costed: CostedModel, devices: Sequence[Device]) -> tuple[CostedModel, DeviceMap]:
    """Return the map with the lowest fill of the fullest device, and the costs with the constraints that it meets.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    entry = costed.structure.entry
    if entry <= costed.constraints.on_first or (costed.head_device is not None and _is_tied_to_head(costed, entry)):
        return _best(costed, devices)
    try:
        pinned = _best(replace(costed, constraints=costed.constraints.with_met(entry | {None})), devices)
    except DoesNotFit:
        return _best(costed, devices)
    fill = _fill(costed, pinned[1], devices)
    least = lower_bound(costed, devices) / max(device.capacity for device in devices)
    if fill <= 1 and least > fill * (1 - WORTH_LEAVING_FIRST_DEVICE):
        return pinned  # no map is that much better
    anywhere = _best(costed, devices)
    other = _fill(costed, anywhere[1], devices)
    return anywhere if other <= fill * (1 - WORTH_LEAVING_FIRST_DEVICE) or other <= 1 < fill else pinned


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


def _best(costed: CostedModel, devices: Sequence[Device]) -> tuple[CostedModel, DeviceMap]:
    """Return the memory-balanced map: layers in a row that passes each device once, embedding, tower and head anywhere.

    For each order of devices and place of the groups that is tried, no other map has a lower worst fill fraction.
    The head is on `costed.head_device`, unless the model fits only if it is elsewhere.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    if costed.head_device is None:
        return costed, _balanced(costed, devices)
    free = replace(costed, head_device=None)
    if costed.head_device not in {device.index for device in devices}:
        return free, _balanced(free, devices)
    try:
        together = _balanced(costed, devices)
    except DoesNotFit:
        return free, _balanced(free, devices)
    if not evaluate("balanced", costed, together, devices).shortfall:
        return costed, together
    elsewhere = _balanced(free, devices)
    if evaluate("balanced", free, elsewhere, devices).shortfall:
        return costed, together
    return free, elsewhere


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


def _solve(chain: Chain, first: BlockCost, devices: Sequence[Device], least: float = 0) -> tuple[DeviceMap, float]:
    solution = solve(chain, MemoryProblems(chain, first, devices[0]), devices, least)
    assert solution is not None, "the first layout always has a partition"
    return solution


def _starting_on(device_map: DeviceMap, first_device: int) -> DeviceMap:
    """Return the map with something on the first device in front.

    Up to 1.10 at least, accelerate has inputs arrive where the first entry is.
    """
    front = next((name for name, place in device_map.items() if place == first_device), None)
    return device_map if front is None else {front: first_device, **device_map}


def _weights_fit(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> bool:
    held = {device.index: 0 for device in devices}
    for block, cost in zip(costed.blocks, costed.costs, strict=True):
        held[int(device_map[block.name])] += cost.weights
    return all(held[device.index] <= device.holds_weights for device in devices)
