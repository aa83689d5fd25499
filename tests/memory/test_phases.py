"""Blocks that compute at several times of a pass, and what devices hold then."""

from balance_shim.memory.cost import BlockCost, Phase
from balance_shim.memory.peak import PLAIN, Schedule, merged, peak, peak_terms
from balance_shim.memory.tracing.phases import phases_of

INPUTS, EMBEDDING, TOWER, LAYER = 0, 1, 2, 3
# (device, allocated or -1 - number of what is freed, node of autograd), as a trace records it.
FORWARD = [
    (EMBEDDING, 10, 1),
    (TOWER, 40, 2),
    (EMBEDDING, 12, 3),  # the merged embeddings, for which the others go
    (EMBEDDING, -1, 3),
    (LAYER, 30, 4),
    (INPUTS, 20, 5),  # the outputs, which the loss is made from
    (INPUTS, -1, 5),
]
BACKWARD = [
    (LAYER, 25, 4),  # its gradient
    (LAYER, -1, 4),
    (EMBEDDING, 14, 3),  # on its way to both
    (EMBEDDING, -2, 3),
    (TOWER, 35, 2),
    (TOWER, -1, 2),
    (EMBEDDING, 100, 1),
    (EMBEDDING, -3, 1),
]
GRADIENTS = {EMBEDDING: 100, TOWER: 35, LAYER: 25}


def costs_of(phases, accumulating=False):
    """Return a cost for each device, as a profile makes them; gradients are those of the record."""
    costs = {}
    for device, own in phases.items():
        gradients = 0 if accumulating else GRADIENTS.get(device, 0)
        parts = tuple(
            Phase(phase.start, phase.kept, phase.most_forward, phase.most_backward, phase.left - gradients_left)
            for phase, gradients_left in zip(own, [gradients, *[0] * len(own)], strict=False)
        )
        costs[device] = BlockCost(gradients=gradients, rank=own[0].start, phases=parts)
    return costs


def joint_peak(record, devices):
    """Return the most that `devices` hold together at one time of the record."""
    live = most = 0
    sizes = {device: [] for device in devices}
    for device, event, _ in record:
        if device in devices:
            if event >= 0:
                sizes[device].append(event)
            live += event if event >= 0 else -sizes[device][-1 - event]
            most = max(most, live)
    return most


def test_phases_are_told_apart_by_what_runs_in_between():
    """The embedding computes ahead of the tower and behind it, and its gradient appears when all others are there."""
    phases = phases_of(FORWARD + BACKWARD, len(FORWARD))
    assert [len(phases[device]) for device in (EMBEDDING, TOWER, LAYER, INPUTS)] == [2, 1, 1, 1]
    early, late = phases[EMBEDDING]
    assert (early.forward, early.backward) == ([10], [100, -3])
    assert (late.forward, late.backward) == ([12, -1], [14, -2])


def test_a_device_with_several_blocks_holds_what_the_record_shows():
    """Composed of phases, the peak of any blocks on one device is that of their record, moment by moment."""
    record = FORWARD + BACKWARD
    costs = costs_of(phases_of(record, len(FORWARD)))
    for devices in ([EMBEDDING], [EMBEDDING, TOWER], [EMBEDDING, LAYER], [INPUTS, EMBEDDING, TOWER], list(costs)):
        here = [costs[device] for device in reversed(devices)]  # ranks are the order
        assert peak(here) == joint_peak(record, devices), devices
        assert sum(peak_terms(here).values()) == joint_peak(record, devices)


def test_what_waits_for_an_earlier_phase_counts_in_between():
    """The gradient of the merged embeddings is there while the tower runs backward, with accumulation, too."""
    tower = [(TOWER, 60, 2), (TOWER, -2, 2), (TOWER, -1, 2)]
    record = [*FORWARD, *BACKWARD[:4], *tower, (EMBEDDING, -3, 1)]
    costs = costs_of(phases_of(record, len(FORWARD)), accumulating=True)
    here = [costs[EMBEDDING], costs[TOWER]]
    assert peak(here, Schedule(accumulating=True)) == joint_peak(record, [EMBEDDING, TOWER]) == 40 + 14 + 60


def test_one_cost_for_all_phases_is_never_less():
    """The solver joins blocks, and plans for no less than what evaluating the map shows."""
    costs = list(costs_of(phases_of(FORWARD + BACKWARD, len(FORWARD))).values())
    assert peak([merged(costs)], PLAIN) == peak(costs, PLAIN)


def test_more_of_a_block_is_more_of_its_first_phase():
    """What was seen beyond the prediction is added where it counts."""
    cost = costs_of(phases_of(FORWARD + BACKWARD, len(FORWARD)))[EMBEDDING]
    assert peak([cost.with_more(passing=1000)]) >= 1000
    assert peak([cost.with_more(kept=500), BlockCost(rank=9, forward=1)]) >= 500
    assert BlockCost.from_json({**vars(cost), "phases": [vars(phase) for phase in cost.phases]}) == cost
