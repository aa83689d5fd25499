"""Mode `balanced`: the device map under which the fullest device is as empty as it can be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..devices import Device
from ..memory.blocks import Block
from ..memory.compose import NOTHING, segment_peaks
from ..memory.estimate import BlockCost
from .map_file import DeviceMap
from .plan import CostedModel
from .solver import partition, worst_fill


class DoesNotFit(Exception):
    """The weights alone exceed what the devices have. `missing` is the number of bytes."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class _Link:
    """A member of the chain that is cut: blocks that go together, with their cost."""

    blocks: tuple[Block, ...]
    cost: BlockCost


@dataclass(frozen=True)
class _Ring:
    """What must share a device though it stands at both ends of the chain, such as a head tied to the embedding.

    `on_first` pins it to the first device.
    """

    first: _Link
    last: _Link
    on_first: bool = False


def balance(costed: CostedModel, devices: Sequence[Device]) -> DeviceMap:
    """Return an optimal map: no other contiguous map, with ties kept, has a lower worst fill fraction.

    Raises:
        DoesNotFit: the weights alone do not fit the devices without going to the host.
    """
    ring, chain = _join(costed, len(devices))
    device_map = _solve(chain, ring, devices, costed.workload.accumulation, costed.returned)
    if not _weights_fit(costed, device_map, devices):
        # The prediction is over capacity everywhere; what can still be had is that everything loads.
        bare = [_weights_only(link) for link in chain]
        bare_ring = ring and _Ring(_weights_only(ring.first), _weights_only(ring.last), ring.on_first)
        device_map = _solve(bare, bare_ring, [_whole(device) for device in devices])
        if not _weights_fit(costed, device_map, devices):
            needed = sum(cost.weights for cost in costed.costs)
            raise DoesNotFit(needed, sum(device.available for device in devices))
    return {block.name: device_map[block.name] for block in costed.blocks}


def _solve(
    chain: Sequence[_Link], ring: _Ring | None, devices: Sequence[Device], accumulation: int = 1, returned: int = 0
) -> DeviceMap:
    """Cut the chain; a ring is tried on every device, as the best place for it depends on all the rest."""
    costs = [link.cost for link in chain]
    capacities = [float(device.capacity) for device in devices]
    plain = segment_peaks(costs, accumulation)
    # Outputs return to the first device. With a ring there, the head is there and nothing has to be copied.
    first = segment_peaks(costs, accumulation, last=BlockCost(temporary=returned)) if len(devices) > 1 else plain
    if ring is None:
        cuts = partition([first, *[plain] * (len(devices) - 1)], capacities)
        return DeviceMap(_places(chain, cuts, devices))
    around = segment_peaks(costs, accumulation, first=ring.first.cost, last=ring.last.cost)
    candidates = []
    for host in range(1 if ring.on_first else len(devices)):
        loads = [first, *[plain] * (len(devices) - 1)]
        loads[host] = around
        cuts = partition(loads, capacities)
        candidates.append((worst_fill(loads, capacities, cuts), host, cuts))
    # Within rounding of each other the first device is taken: inputs arrive there.
    least = min(worst for worst, _, _ in candidates)
    _, host, cuts = next(candidate for candidate in candidates if candidate[0] <= least * (1 + 1e-9))
    device_map = DeviceMap(_places(chain, cuts, devices))
    device_map.update({block.name: devices[host].index for end in (ring.first, ring.last) for block in end.blocks})
    return device_map


def _places(chain: Sequence[_Link], cuts: Sequence[int], devices: Sequence[Device]) -> Iterator[tuple[str, int]]:
    for device, start, stop in zip(devices, cuts, cuts[1:], strict=False):
        yield from ((block.name, device.index) for link in chain[start:stop] for block in link.blocks)


def _join(costed: CostedModel, devices: int) -> tuple[_Ring | None, list[_Link]]:
    """Return the chain with what belongs together joined, and the ring if ties join its two ends."""
    links = [_Link((block,), cost) for block, cost in zip(costed.blocks, costed.costs, strict=True)]
    links = _whole_towers(_follow(links), devices)
    for group in costed.ties:
        holders = [position for position, link in enumerate(links) if _holds(link, group)]
        if len(holders) > 1 and holders != [0, len(links) - 1]:
            # Rare (an encoder and decoder that share their embedding): the whole stretch cannot be one block, so all
            # holders go where the first one is and the chain crosses over and back.
            links = [
                _merge([links[position] for position in holders]) if position == holders[0] else link
                for position, link in enumerate(links)
                if position not in holders[1:]
            ]
    tied_ends = any(len(links) > 1 and _holds(links[0], group) and _holds(links[-1], group) for group in costed.ties)
    if costed.loss_on_first:
        # Behind the last layer come pooler, head, classifier: all that makes the logits.
        tail = 1 + max((place for place, link in enumerate(links) if link.blocks[0].role == "layer"), default=0)
        start = 1 if tied_ends else 0
        if links[tail:]:
            return _Ring(_merge(links[:start]), _merge(links[tail:]), on_first=True), links[start:tail]
    if tied_ends:
        return _Ring(links[0], links[-1]), links[1:-1]
    return None, links


def _follow(links: Sequence[_Link]) -> list[_Link]:
    """Join blocks without parameters (rotary embeddings) and single tensors to the block that they serve.

    They cost next to nothing, and away from their users each step would copy what they give.
    """
    anchors = [not _is_follower(link) for link in links]
    if not any(anchors):
        return list(links)
    joined: dict[int, list[_Link]] = {position: [] for position, anchor in enumerate(anchors) if anchor}
    for position, link in enumerate(links):
        parent = link.blocks[0].name.rpartition(".")[0]
        family = [anchor for anchor in joined if links[anchor].blocks[0].name.startswith(f"{parent}.")]
        target = position if anchors[position] else min(family or joined)
        joined[target].append(link)
    return [_merge(group) for group in joined.values()]


def _is_follower(link: _Link) -> bool:
    block = link.blocks[0]
    return block.kind == "tensor" or not block.parameters


def _whole_towers(links: Sequence[_Link], devices: int) -> list[_Link]:
    """Keep a vision or audio tower on one device while it is no more than a device's share.

    Split towers are where cross-device errors of vision-language models come from.
    """
    tower = [position for position, link in enumerate(links) if link.blocks[0].role == "tower"]
    if not tower or tower != list(range(tower[0], tower[-1] + 1)):
        return list(links)
    whole = _merge([links[position] for position in tower])
    if _bytes(whole.cost) * devices > sum(_bytes(link.cost) for link in links):
        return list(links)
    return [*links[: tower[0]], whole, *links[tower[-1] + 1 :]]


def _merge(links: Sequence[_Link]) -> _Link:
    cost = NOTHING
    for link in links:
        cost += link.cost
    return _Link(tuple(block for link in links for block in link.blocks), cost)


def _weights_only(link: _Link) -> _Link:
    return _Link(link.blocks, BlockCost(weights=link.cost.weights))


def _bytes(cost: BlockCost) -> int:
    return cost.weights + cost.gradients + cost.optimizer + cost.activations + cost.temporary


def _holds(link: _Link, names: frozenset[str]) -> bool:
    return any(not names.isdisjoint(block.tensors) for block in link.blocks)


def _whole(device: Device) -> Device:
    return Device(device.index, device.name, device.available, device.available)


def _weights_fit(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> bool:
    held = {device.index: 0 for device in devices}
    for block, cost in zip(costed.blocks, costed.costs, strict=True):
        held[int(device_map[block.name])] += cost.weights
    return all(held[device.index] <= device.available for device in devices)
