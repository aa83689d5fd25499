"""The peak of a device as it happens in time."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import NOTHING, PLAIN, RunPeaks, Schedule, merged, peak, peak_terms

SIZES = st.integers(0, 100)


def block_cost(weights, gradients, optimizer, activations, forward, backward, step):
    """Return a cost as blocks have them: what is kept is there in each pass."""
    return BlockCost(weights, gradients, optimizer, activations, activations + forward, activations + backward, step)


COSTS = st.builds(block_cost, *[SIZES] * 7)
PLAIN_SCHEDULES = st.builds(Schedule, accumulating=st.booleans(), step_at_once=st.booleans())
IN_FLIGHT = st.builds(
    Schedule,
    accumulating=st.just(True),
    step_at_once=st.booleans(),
    in_flight=st.integers(2, 4),
    in_chunks=st.booleans(),
)
SCHEDULES = st.one_of(PLAIN_SCHEDULES, IN_FLIGHT)
NO_LIMIT = float("inf")
BUSY = settings(suppress_health_check=[HealthCheck.too_slow])  # other tests may run on the same cores


def replay(costs, schedule):
    """Walk through a training step event by event and return the most bytes held; the slow, obvious way."""
    held = sum(cost.weights + cost.optimizer for cost in costs)
    gradients = [0] * len(costs)
    moments = [held]
    size = schedule.in_flight
    chunks = (2 if schedule.in_chunks else 1) if size > 1 else 3 if schedule.accumulating else 1
    for _ in range(chunks):
        activations = [[0] * len(costs) for _ in range(size)]

        def there(activations=activations):
            return held + sum(gradients) + sum(map(sum, activations))

        for flight in activations:
            for position, cost in enumerate(costs):
                moments.append(there() + cost.forward)
                flight[position] = cost.activations
        for flight in activations:
            for position, cost in reversed(list(enumerate(costs))):
                flight[position] = 0
                moments.append(there() + cost.backward)
                gradients[position] = cost.gradients
    if schedule.step_at_once:
        moments.append(held + sum(gradients) + sum(cost.step for cost in costs))
    else:
        moments += [held + sum(gradients) + cost.step for cost in costs]
    return max(*moments, held + sum(gradients))


@BUSY
@given(st.lists(COSTS, max_size=8), SCHEDULES)
def test_peak_equals_a_replay_of_the_step(costs, schedule):
    """The running formula gives what a walk through micro-batches and step gives."""
    assert peak(costs, schedule) == replay(costs, schedule)


@BUSY
@given(st.lists(COSTS, min_size=1, max_size=8), SCHEDULES)
def test_terms_add_up_to_the_peak(costs, schedule):
    """The breakdown is that of the moment of the peak, and no part of it is below nothing."""
    terms = peak_terms(costs, schedule)
    assert sum(terms.values()) == peak(costs, schedule)
    assert min(terms.values()) >= 0


@BUSY
@given(st.lists(COSTS, max_size=4), st.lists(COSTS, max_size=4), st.lists(COSTS, max_size=4), SCHEDULES)
def test_blocks_as_one_are_what_they_are_apart(before, members, behind, schedule):
    """Blocks that are merged into one have the peak of the several, whatever is ahead of them and behind them."""
    apart = [*before, *members, *behind]
    assert peak([*before, merged(members, schedule), *behind], schedule) == peak(apart, schedule)


@BUSY
@given(st.lists(COSTS, max_size=6), SCHEDULES, COSTS, COSTS)
def test_run_peaks_hold_every_run(costs, schedule, first, last):
    """Each entry of a row is the peak of its run between what sits on the device anyway."""
    loads = RunPeaks(costs, schedule, first, last)
    for start in range(len(costs) + 1):
        stops = range(start, len(costs) + 1)
        expected = [peak([first, *costs[start:stop], last], schedule) for stop in stops]
        assert list(loads.row(start, NO_LIMIT)) == expected
        assert expected == sorted(expected), "the solver relies on loads that do not fall"


@BUSY
@given(st.lists(COSTS, max_size=8), SCHEDULES, st.lists(st.integers(0, 3000), min_size=1, max_size=4))
def test_rows_are_worked_out_as_far_as_asked(costs, schedule, limits):
    """A row ends with the chain or with the first entry above the limit, whatever was asked before."""
    loads = RunPeaks(costs, schedule)
    full_row = list(RunPeaks(costs, schedule).row(0, NO_LIMIT))
    requested = 0
    for limit in limits:
        requested = max(requested, limit)
        row = list(loads.row(0, limit))
        assert row == full_row[: len(row)]
        assert len(row) == len(full_row) or row[-1] > requested >= max(row[:-1], default=0)


def test_gradients_grow_while_activations_shrink():
    """Without accumulation, gradients and activations of the same bytes do not add up; with it they do."""
    chain = [BlockCost(gradients=10, activations=10, forward=10, backward=20)] * 10
    assert peak(chain) == 110
    # The gradients of the block that runs are there as well, so that its own activations are all it adds.
    chain = [BlockCost(gradients=10, activations=10, forward=10, backward=10)] * 10
    assert peak(chain, Schedule(accumulating=True)) == 200
    assert peak([]) == peak([NOTHING]) == 0


def test_temporaries_of_the_step_add_up_where_it_takes_all_at_once():
    """The step comes on top of all gradients: with the largest block's temporaries, or with those of all."""
    chain = [BlockCost(gradients=10, step=step) for step in (1, 5, 3)]
    assert peak(chain, PLAIN) == 35
    assert peak(chain, Schedule(step_at_once=True)) == 39
