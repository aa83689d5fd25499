"""The solver against brute force."""

from itertools import combinations_with_replacement, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from balance_shim.memory.compose import segment_peaks
from balance_shim.memory.estimate import BlockCost
from balance_shim.placement.solver import partition, worst_fill

COSTS = st.builds(BlockCost, *[st.integers(0, 50)] * 5)


@settings(max_examples=400)
@given(
    st.lists(COSTS, min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 300), COSTS, COSTS), min_size=1, max_size=4),
    st.sampled_from([1, 4]),
)
def test_no_partition_is_better(costs, devices, accumulation):
    """For any chain, unequal devices, and whatever sits on them already, brute force finds nothing better."""
    loads = [segment_peaks(costs, accumulation, first, last) for _, first, last in devices]
    capacities = [capacity for capacity, _, _ in devices]
    cuts = partition(loads, capacities)
    assert cuts[0] == 0 and cuts[-1] == len(costs) and cuts == sorted(cuts) and len(cuts) == len(devices) + 1
    inner = combinations_with_replacement(range(len(costs) + 1), len(devices) - 1)
    best = min(worst_fill(loads, capacities, (0, *choice, len(costs))) for choice in inner)
    assert worst_fill(loads, capacities, cuts) <= best * (1 + 1e-8)


def test_the_other_devices_are_even_too():
    """One heavy block decides the worst device; the rest is spread evenly instead of packed to that level."""
    chain = [BlockCost(weights=weights) for weights in [40, 10, 10, 10, 10, 10, 10]]
    cuts = partition([segment_peaks(chain)] * 4, [100.0] * 4)
    assert cuts == [0, 1, 3, 5, 7]


def test_unequal_devices_fill_in_proportion():
    """A device of twice the capacity takes twice as many of equal blocks."""
    chain = [BlockCost(weights=10)] * 12
    assert partition([segment_peaks(chain)] * 3, [24.0, 48.0, 48.0]) in ([0, 2, 7, 12], [0, 3, 7, 12], [0, 3, 8, 12])


def test_more_devices_than_blocks():
    """Devices may stay empty."""
    cuts = partition([segment_peaks([BlockCost(weights=7)] * 2)] * 5, [10.0] * 5)
    assert sum(start < stop for start, stop in pairwise(cuts)) == 2
