"""Divide the devices of a machine among the ranks that train on it.

The weakest share decides whether the model fits, and all ranks wait for each other. So the share with the least memory
gets as much as possible, then the second one, and so on. Among the divisions that are equally good, devices with a fast
link stay together, and rank r has device r, where scripts and libraries put its inputs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import product

Share = tuple[int, ...]  # the indices of the devices of one rank; inputs arrive on the first
_Counts = tuple[int, ...]  # devices of each capacity


def divide(capacities: Mapping[int, int], ranks: int, links: Collection[frozenset[int]] = ()) -> tuple[Share, ...]:
    """Return the share of each rank.

    Exact for the memory of shares. Links and device numbers are followed as far as two simple rules go: one rank after
    the other takes linked devices, or the devices r, r + ranks, r + 2 ranks, ...

    Args:
        capacities: device index -> bytes.
        ranks: how many processes train on this machine; at most as many as there are devices.
        links: pairs of devices with a fast link.

    Returns:
        ranks shares, disjoint and not empty; together they are all devices. The same arguments give the same shares.

    Raises:
        ValueError: there are more ranks than devices.
    """
    if not 1 <= ranks <= len(capacities):
        raise ValueError(f"{len(capacities)} devices for {ranks} ranks")
    sizes = sorted(set(capacities.values()))
    counts = tuple(sum(capacity == size for capacity in capacities.values()) for size in sizes)
    kinds = {index: sizes.index(capacity) for index, capacity in capacities.items()}
    compositions = _fairest(counts, tuple(sizes), ranks)
    by_number = _assigned(compositions, kinds, links=())
    if not links:
        return by_number
    by_link = _assigned(compositions, kinds, links)
    return max((by_link, by_number), key=lambda shares: (_links_within(shares, links), _ranks_at_home(shares)))


def _fairest(counts: _Counts, sizes: Sequence[int], ranks: int) -> tuple[_Counts, ...]:
    """Return how many devices of each size the shares get, so that the list of their sums, smallest first, is largest.

    Shares are chosen in descending order of their counts, which visits each division once.
    """

    @cache
    def best(left: _Counts, ranks: int, limit: _Counts) -> tuple[tuple[int, ...], tuple[_Counts, ...]] | None:
        if ranks == 1:
            return None if left > limit or not any(left) else ((_sum(left),), (left,))
        fairest = None
        for share in _parts(left):
            if share > limit or not any(share):
                continue
            rest = best(tuple(a - b for a, b in zip(left, share, strict=True)), ranks - 1, share)
            if rest is not None:
                sums = tuple(sorted((_sum(share), *rest[0])))
                if fairest is None or sums > fairest[0]:
                    fairest = sums, (share, *rest[1])
        return fairest

    def _sum(share: _Counts) -> int:
        return sum(count * size for count, size in zip(share, sizes, strict=True))

    fairest = best(counts, ranks, counts)
    assert fairest is not None, "there are at least as many devices as ranks"
    return fairest[1]


def _parts(counts: _Counts) -> Iterator[_Counts]:
    """Yield each way to take some of `counts`."""
    return product(*(range(count + 1) for count in counts))


def _assigned(
    compositions: Sequence[_Counts], kinds: Mapping[int, int], links: Collection[frozenset[int]]
) -> tuple[Share, ...]:
    """Return shares of these compositions: who gets which, and of which devices.

    Args:
        compositions: how many devices of each kind a share gets.
        kinds: device index -> its kind.
        links: pairs to keep together; without any, devices are dealt out by their numbers.
    """
    ranks, order = len(compositions), sorted(kinds)
    remaining = [
        list(composition) for composition in _for_ranks(compositions, [kinds[order[rank]] for rank in range(ranks)])
    ]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    left = dict.fromkeys(order)

    def take(rank: int, device: int) -> None:
        shares[rank].append(device)
        remaining[rank][kinds[device]] -= 1
        del left[device]

    if not links:
        for rank in range(ranks):
            if remaining[rank][kinds[order[rank]]]:
                take(rank, order[rank])
    for rank in range(ranks):
        while any(remaining[rank]):
            fitting = [device for device in left if remaining[rank][kinds[device]]]
            near = {device: _linked(device, shares[rank], links) for device in fitting}
            best = max(near.values())
            at_hand = [device for device in fitting if near[device] == best]
            strided = [device for device in at_hand if not links and order.index(device) % ranks == rank]
            take(rank, (strided or at_hand)[0])
    return tuple(tuple(share) for share in shares)


def _for_ranks(compositions: Sequence[_Counts], home: Sequence[int]) -> list[_Counts]:
    """Return the compositions in an order in which as many as possible have a device of kind `home[rank]`."""
    rank_of: dict[int, int] = {}  # composition -> rank

    def settle(rank: int, tried: set[int]) -> bool:
        for number in sorted(range(len(compositions)), key=rank_of.__contains__):  # those that are free first
            if compositions[number][home[rank]] and number not in tried:
                tried.add(number)
                if number not in rank_of or settle(rank_of[number], tried):
                    rank_of[number] = rank
                    return True
        return False

    for rank in range(len(compositions)):
        settle(rank, set())
    by_rank = {rank: number for number, rank in rank_of.items()}
    unassigned = iter(number for number in range(len(compositions)) if number not in rank_of)
    return [compositions[by_rank[rank] if rank in by_rank else next(unassigned)] for rank in range(len(compositions))]


def _linked(device: int, share: Collection[int], links: Collection[frozenset[int]]) -> int:
    return sum(frozenset((device, other)) in links for other in share)


def _links_within(shares: Sequence[Share], links: Collection[frozenset[int]]) -> int:
    return sum(any(link <= set(share) for share in shares) for link in links)


def _ranks_at_home(shares: Sequence[Share]) -> int:
    return sum(rank in share for rank, share in enumerate(shares))
