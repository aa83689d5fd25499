"""Chains on chains: cut a chain of blocks into one run a device so that the fullest device is as empty as can be.

Pure Python without torch. The method is bisection over the fill fraction with a greedy probe (Pinar and Aykanat,
"Fast optimal load balancing algorithms for 1D partitioning", JPDC 64, 2004), which is exact for devices of unequal
capacity in a given order and for any load that does not fall when a run grows, not only for sums.
"""

from bisect import bisect_right
from collections.abc import Sequence

Loads = Sequence[Sequence[float]]
"""`loads[i][j - i]`: what a device carries with blocks i to j-1. Rows do not fall from left to right."""


_ROUNDING = 1 + 1e-9  # load / capacity * capacity may come out below the load


def partition(loads: Sequence[Loads], capacities: Sequence[float]) -> list[int]:
    """Return the cuts of an optimal partition: device d takes blocks cuts[d] to cuts[d + 1] - 1.

    Among the partitions whose fullest device is as empty as possible, the one with the least sum of squared fill
    fractions is returned, so that the other devices are even, too.

    Args:
        loads: a table for each device, in the devices' order; the same table may stand for several.
        capacities: of each device, above 0, in the unit of the loads.

    Cost: O(devices x log blocks) for each of about 50 probes, then O(devices x blocks x longest run).
    """
    blocks = len(loads[0]) - 1
    low, high = 0.0, max(table[0][-1] / capacity for table, capacity in zip(loads, capacities, strict=True))
    best = _probe(loads, capacities, high)
    assert best is not None, "one device that takes everything is within its own fill fraction"
    high = worst_fill(loads, capacities, best)
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        cuts = _probe(loads, capacities, middle)
        if cuts is None:
            low = middle
        else:
            # What was reached is never above what was asked, and is one of finitely many values: bisection ends.
            high = min(worst_fill(loads, capacities, cuts), middle)
    return _most_even(loads, capacities, high * _ROUNDING, blocks)


def worst_fill(loads: Sequence[Loads], capacities: Sequence[float], cuts: Sequence[int]) -> float:
    """Return the fill fraction of the fullest device under `cuts`."""
    return max(
        table[start][stop - start] / capacity
        for table, capacity, start, stop in zip(loads, capacities, cuts, cuts[1:], strict=False)
    )


def _probe(loads: Sequence[Loads], capacities: Sequence[float], fill: float) -> list[int] | None:
    """Return cuts in which no device exceeds `fill`, giving each the longest run it can; None if there are none."""
    cuts = [0]
    for table, capacity in zip(loads, capacities, strict=True):
        run = bisect_right(table[cuts[-1]], fill * capacity * _ROUNDING) - 1
        if run < 0:  # what sits on this device anyway is too much
            return None
        cuts.append(cuts[-1] + run)
    return cuts if cuts[-1] == len(loads[0]) - 1 else None


def _most_even(loads: Sequence[Loads], capacities: Sequence[float], fill: float, blocks: int) -> list[int]:
    """Return the cuts with the least sum of squared fill fractions among those within `fill`."""
    # best[j]: the least sum for the devices so far and blocks 0 to j-1; back[d][j]: where device d's run starts then.
    infinity = float("inf")
    best = [0.0] + [infinity] * blocks
    back: list[list[int]] = []
    for table, capacity in zip(loads, capacities, strict=True):
        following, starts = [infinity] * (blocks + 1), [0] * (blocks + 1)
        for start, so_far in enumerate(best):
            if so_far == infinity:
                continue
            for run, load in enumerate(table[start]):
                fraction = load / capacity
                if fraction > fill:
                    break
                if so_far + fraction * fraction < following[start + run]:
                    following[start + run] = so_far + fraction * fraction
                    starts[start + run] = start
        best = following
        back.append(starts)
    cuts = [blocks]
    for starts in reversed(back):
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]
