"""Remedies that are named after an out-of-memory hold by what was measured."""

from types import SimpleNamespace

from balance_shim.training.oom.remedies import as_measured
from tests.report.test_plan_report import GIB, plan


def scene(predicted, measured, kept=None):
    """An out-of-memory on the first device, which was predicted to hold one size and has held another."""
    return SimpleNamespace(
        meter=SimpleNamespace(indices=(0, 1)), failed=0, actual=predicted, kept=kept, peak=lambda position: measured
    )


def with_activations(size, capacity=24 * GIB):
    """Return a plan of two devices with 4 GiB of weights and so many activations on each."""
    made = plan((4 * GIB, capacity), (4 * GIB, capacity))
    for device in made.devices:
        device.terms["activations"] = size
    return made


def test_a_remedy_is_judged_by_what_was_measured():
    """Activations were 1.5 times the prediction, so a remedy with 14 GiB of them takes 21, and does not fit."""
    failed = scene(with_activations(16 * GIB), 28 * GIB)
    assert not with_activations(14 * GIB).shortfall
    judged = as_measured(failed, with_activations(14 * GIB))
    assert judged.worst.predicted_peak == 25 * GIB and judged.shortfall == GIB
    assert as_measured(failed, with_activations(12 * GIB)).worst.predicted_peak == 22 * GIB


def test_a_prediction_that_was_right_changes_nothing():
    """Neither where less was measured, nor where what grows is something that was kept."""
    remedy = with_activations(14 * GIB)
    assert as_measured(scene(with_activations(16 * GIB), 19 * GIB), remedy) == remedy
    assert as_measured(scene(with_activations(16 * GIB), 28 * GIB, kept=object()), remedy) == remedy
