"""The solver against brute force."""

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import RunPeaks, Schedule
from balance_shim.placement.solver import Table, least_fill, partition, worst_fill

# No block is without weights: a chain of nothing is never to be placed.
COSTS = st.builds(BlockCost, st.integers(1, 50), *[st.integers(0, 50)] * 6)
SCHEDULES = st.builds(Schedule, accumulating=st.booleans(), step_at_once=st.booleans())


def table_of(weights):
    """Return loads that are sums of `weights`."""
    return Table([[sum(weights[start:stop]) for stop in range(start, len(weights) + 1)] for start in range(8 + 1)])


def runs(weights):
    return RunPeaks([BlockCost(weights=weight) for weight in weights])


@settings(max_examples=400)
@given(
    st.lists(COSTS, min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 300), COSTS, COSTS), min_size=1, max_size=4),
    SCHEDULES,
)
def test_no_partition_is_better(costs, devices, schedule):
    """For any chain, unequal devices, and whatever sits on them already, brute force finds nothing better."""
    loads = [RunPeaks(costs, schedule, first, last) for _, first, last in devices]
    capacities = [capacity for capacity, _, _ in devices]
    cuts = partition(loads, capacities, len(costs))
    assert cuts[0] == 0 and cuts[-1] == len(costs) and cuts == sorted(cuts) and len(cuts) == len(devices) + 1
    inner = combinations_with_replacement(range(len(costs) + 1), len(devices) - 1)
    best = min(worst_fill(loads, capacities, (0, *choice, len(costs))) for choice in inner)
    assert worst_fill(loads, capacities, cuts) <= best * (1 + 1e-8)


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.floats(0.5, 1.5),
)
def test_a_bound_ends_the_search_only_where_it_cannot_be_beaten(weights, capacities, part):
    """With a fraction to beat, the optimum comes back where it is lower, and nothing where it is not."""
    loads = [table_of(weights + [0] * (8 - len(weights)))] * len(capacities)
    fill, cuts = least_fill(loads, capacities, 8)
    assert cuts is not None and worst_fill(loads, capacities, cuts) == pytest.approx(fill, rel=1e-8)
    bound = fill * part
    lowest, better = least_fill(loads, capacities, 8, below=bound)
    if fill < bound * (1 - 1e-8):
        assert better is not None and lowest == pytest.approx(fill, rel=1e-8)
    elif fill > bound * (1 + 1e-8):
        assert better is None and lowest == bound


def test_tables_and_run_peaks_are_solved_alike():
    """It makes no difference whether loads are known in full or worked out as they are asked for."""
    weights, capacities = [9, 1, 1, 4, 4, 2, 8, 3], [20.0, 10.0, 30.0]
    table = partition([table_of(weights)] * 3, capacities, 8)
    assert table == partition([runs(weights)] * 3, capacities, 8)


def test_the_other_devices_are_even_too():
    """One heavy block decides the fullest device; the rest is spread evenly instead of packed to that level."""
    cuts = partition([runs([40, 10, 10, 10, 10, 10, 10])] * 4, [100.0] * 4, 7)
    assert cuts == [0, 1, 3, 5, 7]


def test_unequal_devices_fill_in_proportion():
    """A device of twice the capacity takes twice as many of equal blocks."""
    cuts = partition([runs([10] * 12)] * 3, [24.0, 48.0, 48.0], 12)
    assert cuts in ([0, 2, 7, 12], [0, 3, 7, 12], [0, 3, 8, 12])


def test_more_devices_than_blocks():
    """Devices may stay empty."""
    cuts = partition([runs([7] * 2)] * 5, [10.0] * 5, 2)
    assert sum(start < stop for start, stop in pairwise(cuts)) == 2
