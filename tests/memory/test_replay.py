"""What a replay makes of the records of a trace: gradients of first micro-batches, evaluations, lengths that vary."""

from dataclasses import replace

from balance_shim.memory.allocation_record import Record, from_json, to_json
from balance_shim.memory.replay import DeviceRun, EvaluationRun, replay
from balance_shim.units import MIB
from balance_shim.virtual.allocator_settings import DEFAULT

ROOM = 1 << 40
LAYER = Record(
    weights=(16 * MIB,),
    gradients=(16 * MIB,),
    forward=(30 * MIB, 40 * MIB, -2),
    backward=(16 * MIB, -1),
)


def reserved(**fields):
    return replay(DeviceRun((LAYER,), **fields), ROOM, DEFAULT).reserved


def test_the_first_micro_batch_makes_the_gradients():
    """The gradient that later micro-batches add and free is the one that stays: none is made beside it."""
    adding = replace(LAYER, backward=(16 * MIB, -3, -1))
    device_peak = replay(DeviceRun((adding,), accumulating=True), ROOM, DEFAULT)
    assert device_peak.allocated == (16 + 16 + 30 + 40) * MIB  # weight, gradient, and the second forward pass


def test_an_evaluation_reserves_what_its_batches_take():
    """Its larger batch takes segments of its own, and outputs that are joined are there twice for a moment."""
    evaluated = replace(LAYER, evaluation=((100 * MIB, 60 * MIB, -2),))
    training = replay(DeviceRun((evaluated,)), ROOM, DEFAULT).reserved
    once = replay(DeviceRun((evaluated,), evaluation=EvaluationRun()), ROOM, DEFAULT).reserved
    assert once >= training + (100 - 40) * MIB
    run = EvaluationRun(batches=4, outputs=50 * MIB, most=180 * MIB)
    joined = replay(DeviceRun((evaluated,), evaluation=run), ROOM, DEFAULT)
    assert joined.allocated >= (16 + 180 + 150) * MIB
    apart = replay(DeviceRun((evaluated,), evaluation=replace(run, joined=False)), ROOM, DEFAULT)
    assert apart.allocated < joined.allocated


def test_an_evaluation_of_many_batches_is_replayed_in_little_time():
    """Most of its batches count with the outputs that they leave only."""
    evaluated = replace(LAYER, evaluation=((100 * MIB, 60 * MIB, -2),))
    run = EvaluationRun(batches=10**5, outputs=MIB, most=10**5 * MIB)
    device_peak = replay(DeviceRun((evaluated,), evaluation=run), ROOM, DEFAULT)
    assert device_peak.allocated >= 2 * 10**5 * MIB * 0.95


def test_lengths_that_vary_fragment():
    """Segments of one length do not serve a longer one, while weights and gradients stay as they are."""
    assert reserved(least=0.6) > reserved() == reserved(least=1.0)
    weights = Record(weights=(16 * MIB,), gradients=(16 * MIB,), backward=(16 * MIB,))
    same = [replay(DeviceRun((weights,), least=least), ROOM, DEFAULT) for least in (0.5, 1.0)]
    assert same[0] == same[1]


def test_records_can_be_stored():
    """With phases and evaluations."""
    record = replace(LAYER, later=(((MIB,), (-1,)),), evaluation=((MIB,), (2 * MIB,)))
    assert from_json(to_json([record, None, LAYER])) == (record, None, LAYER)
