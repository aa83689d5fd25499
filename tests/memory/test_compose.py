"""The peak of a device as it happens in time."""

from hypothesis import given
from hypothesis import strategies as st

from balance_shim.memory.compose import NOTHING, peak, peak_terms, segment_peaks
from balance_shim.memory.estimate import BlockCost

COSTS = st.builds(BlockCost, *[st.integers(0, 100)] * 5)


def replay(costs, accumulation):
    """Walk through a training step event by event and return the most bytes held; the slow, obvious way."""
    held = sum(cost.weights + cost.optimizer for cost in costs)
    gradients = sum(cost.gradients for cost in costs) if accumulation > 1 else 0
    activations = sum(cost.activations for cost in costs)
    worst = held + gradients + activations
    for cost in reversed(costs):
        gradients += cost.gradients if accumulation == 1 else 0
        worst = max(worst, held + gradients + activations + cost.temporary)
        activations -= cost.activations
    return max(worst, held + gradients)


@given(st.lists(COSTS, max_size=8), st.sampled_from([1, 4]))
def test_peak_equals_a_replay_of_the_step(costs, accumulation):
    """The running formula gives what a walk through forward and backward pass gives."""
    assert peak(costs, accumulation) == replay(costs, accumulation)


@given(st.lists(COSTS, min_size=1, max_size=8), st.sampled_from([1, 4]))
def test_terms_add_up_to_the_peak(costs, accumulation):
    """The breakdown is that of the moment of the peak."""
    assert sum(peak_terms(costs, accumulation).values()) == peak(costs, accumulation)


@given(st.lists(COSTS, max_size=6), st.sampled_from([1, 4]), COSTS, COSTS)
def test_segment_table_holds_every_run(costs, accumulation, first, last):
    """Each entry of the table is the peak of its run between what sits on the device anyway."""
    rows = segment_peaks(costs, accumulation, first, last)
    for start in range(len(costs) + 1):
        for stop in range(start, len(costs) + 1):
            expected = peak([first, *costs[start:stop], last], accumulation)
            assert rows[start][stop - start] == expected


def test_gradients_grow_while_activations_shrink():
    """Without accumulation, gradients and activations of the same bytes do not add up; with it they do."""
    chain = [BlockCost(gradients=10, activations=10)] * 10
    assert peak(chain) == 110
    assert peak(chain, accumulation=2) == 200
    assert peak([]) == peak([NOTHING]) == 0
