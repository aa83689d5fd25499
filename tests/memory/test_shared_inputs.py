"""Inputs of several blocks: a copy for each on other devices, one tensor where they come from."""

from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import RunPeaks, merged, peak
from balance_shim.memory.tracing.phases import TracedPhase
from balance_shim.memory.tracing.result import Held
from balance_shim.memory.tracing.shared_inputs import Copy, with_shared

GIVER = BlockCost(weights=5, rank=0, gives=((0, False),))
LAYERS = [BlockCost(activations=30, forward=40, backward=50, rank=1 + number, takes=((0, 10),)) for number in range(3)]


def layer_with_events(*events):
    return Held(0, 0, 0, True, phases=(TracedPhase(0, 0, forward=list(events)),))


def test_layers_share_an_input_where_it_comes_from():
    """Three layers keep 3 x 30 bytes apart, and 3 x 20 and the 10 that all of them have beside the giver."""
    assert peak(LAYERS) == 60 + 50
    assert peak([*LAYERS, GIVER]) == 5 + 10 + 40 + 40


def test_an_input_that_is_kept_anyway_costs_its_users_nothing():
    """As inputs of the model, whose bytes count by themselves."""
    giver = BlockCost(weights=5, gives=((0, True),))
    assert peak([giver, *LAYERS]) == 5 + 40 + 40


def test_the_solver_sees_the_same():
    """A run of layers beside the giver costs what the map that comes of it does, and so do links of several blocks."""
    row = RunPeaks(LAYERS, first=GIVER).row(0, float("inf"))
    assert list(row)[-1] == peak([GIVER, *LAYERS])
    links = [merged(LAYERS[:2]), LAYERS[2]]
    assert list(RunPeaks(links, first=GIVER).row(0, float("inf")))[-1] == peak([GIVER, *LAYERS])
    assert BlockCost.from_json({**vars(LAYERS[0]), "phases": [], "takes": [[0, 10]]}) == LAYERS[0]


def test_only_copies_that_are_kept_are_shared():
    """A copy that is freed in the forward pass costs nothing, and hidden states have one user only."""
    copies = [
        Copy((1, 0), True, 2, 0),
        Copy((1, 0), True, 3, 0),
        Copy((1, 1), True, 2, 1),  # one user
        Copy((0, 99), False, 3, 1),  # freed
        Copy((0, 98), False, 3, 2),  # of an input of the model
    ]
    shared = with_shared(
        {
            0: layer_with_events(),
            1: layer_with_events(8, 16, -1, -2),
            2: layer_with_events(8, 16),
            3: layer_with_events(8, 4, 2, -2),
        },
        copies,
    )
    assert shared[1].gives == ((0, False),) and shared[0].gives == ((2, True),)
    assert shared[2].takes == ((0, 8),) and shared[3].takes == ((0, 8), (2, 2))
