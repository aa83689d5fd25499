"""Chains on chains: cut a chain of blocks into one run a device so that the fullest device is as empty as can be.

Pure Python without torch. The method is bisection over the fill fraction with a greedy probe (Pinar and Aykanat,
"Fast optimal load balancing algorithms for 1D partitioning", JPDC 64, 2004), which is exact for devices of unequal
capacity in a given order and for any load that does not fall when a run grows, not only for sums.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Protocol


class Loads(Protocol):
    """The load of a device with any run of the chain."""

    def row(self, start: int, limit: float) -> Sequence[float]:
        """Return the loads with 0, 1, 2, ... blocks from `start` on, up to the first above `limit` at least.

        They do not fall from left to right. The row ends with the chain, so that its length tells where that is.
        """


class Table:
    """Loads that are known in full: `rows[i][j - i]` with blocks i to j-1."""

    def __init__(self, rows: Sequence[Sequence[float]]):
        self._rows = rows

    def row(self, start: int, limit: float) -> Sequence[float]:
        return self._rows[start]


_ROUNDING = 1 + 1e-9  # load / capacity * capacity may come out below the load
# A high power of the loads: their sum is then about that of the second fullest device, and so on. Squares would leave
# devices empty where the first block on a device costs more than the next ones.
_EVENNESS = 12
_CLOSE = 1e-10  # of the fill fraction; bisection ends there at the latest


def partition(loads: Sequence[Loads], capacities: Sequence[float], blocks: int) -> list[int]:
    """Return the cuts of an optimal partition: device d takes blocks cuts[d] to cuts[d + 1] - 1.

    Among the partitions whose fullest device is as empty as possible, one is returned in which the other
    devices are even, too.

    Args:
        loads: for each device, in the devices' order; the same object may stand for several.
        capacities: of each device, above 0, in the unit of the loads.
        blocks: the number of blocks in the chain.

    Cost: O(devices x log blocks) for each of about 30 probes, then, for the evenness, O(devices x window^2), where the
    window is how far a cut can be shifted: a few blocks where all devices are about full, the chain at most.
    """
    worst, _ = least_fill(loads, capacities, blocks)
    return _most_even(loads, capacities, worst * _ROUNDING, blocks)


def least_fill(
    loads: Sequence[Loads], capacities: Sequence[float], blocks: int, below: float | None = None
) -> tuple[float, list[int] | None]:
    """Return the fill fraction of the fullest device in an optimal partition, with the cuts of one such partition.

    Args:
        below: a fraction that has to be beaten; where that cannot be, the cuts are None and this comes back at once.
    """
    if below is not None:
        low, high = 0.0, below * (1 - 2 * _CLOSE)
        best = probe(loads, capacities, blocks, high)
        if best is None:
            return below, None
    else:
        low, high = 0.0, 1.0
        best = probe(loads, capacities, blocks, high)
        while best is None:
            low, high = high, 4 * high
            best = probe(loads, capacities, blocks, high)
    high = worst_fill(loads, capacities, best)
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        cuts = probe(loads, capacities, blocks, middle)
        if cuts is None:
            low = middle
        else:
            # What was reached is never above what was asked, and is one of finitely many values: bisection ends.
            best = cuts
            high = min(worst_fill(loads, capacities, cuts), middle)
    return high, best


def worst_fill(loads: Sequence[Loads], capacities: Sequence[float], cuts: Sequence[int]) -> float:
    """Return the fill fraction of the fullest device under `cuts`."""
    return max(
        _load(device, start, stop) / capacity
        for device, capacity, start, stop in zip(loads, capacities, cuts, cuts[1:], strict=False)
    )


def probe(loads: Sequence[Loads], capacities: Sequence[float], blocks: int, fill: float) -> list[int] | None:
    """Return cuts in which no device exceeds `fill`, giving each the longest run it can; None if there are none."""
    cuts = [0]
    for device, capacity in zip(loads, capacities, strict=True):
        run = _longest_run(device, cuts[-1], fill * capacity * _ROUNDING)
        if run < 0:
            return None
        cuts.append(cuts[-1] + run)
    return cuts if cuts[-1] == blocks else None


def _longest_run(device: Loads, start: int, limit: float) -> int:
    """Return how many blocks from `start` on make no more than `limit`; -1 where what sits there anyway is too much."""
    return bisect_right(device.row(start, limit), limit) - 1


def _load(device: Loads, start: int, stop: int) -> float:
    limit = 0.0
    while True:
        row = device.row(start, limit)
        if len(row) > stop - start:
            return row[stop - start]
        limit = max(2 * row[-1], 1.0)


def _most_even(loads: Sequence[Loads], capacities: Sequence[float], fill: float, blocks: int) -> list[int]:
    """Return the cuts under which the devices below `fill` are as even as can be."""
    limits = [fill * capacity or 1.0 for capacity in capacities]  # 1.0: a chain of no bytes
    # No cut can lie behind where long runs on all devices before it lead, or ahead of where those behind it can begin.
    latest, earliest = [0], [blocks]
    for device, limit in zip(loads, limits, strict=True):
        latest.append(latest[-1] + _longest_run(device, latest[-1], limit))
    for device, limit in zip(reversed(loads), reversed(limits), strict=True):
        earliest.append(_earliest_start(device, earliest[-1], limit))
    earliest.reverse()
    # best[j]: the least sum for the devices so far and blocks 0 to j-1; back[d][j]: where device d's run starts then.
    best = {0: 0.0}
    back: list[dict[int, int]] = []
    for device, limit, first, last in zip(loads, limits, earliest[1:], latest[1:], strict=True):
        following: dict[int, float] = {}
        starts: dict[int, int] = {}
        for start, so_far in best.items():
            row = device.row(start, limit)
            for stop in range(max(start, first), min(last, start + len(row) - 1) + 1):
                load = row[stop - start]
                if load > limit:
                    break
                total = so_far + (load / limit) ** _EVENNESS
                if total < following.get(stop, float("inf")):
                    following[stop] = total
                    starts[stop] = start
        best = following
        back.append(starts)
    cuts = [blocks]
    for starts in reversed(back):
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


def _earliest_start(device: Loads, stop: int, limit: float) -> int:
    """Return the first block from which a run up to `stop` makes no more than `limit`."""
    return bisect_left(range(stop), True, key=lambda start: start + _longest_run(device, start, limit) >= stop)
