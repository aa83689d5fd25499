"""Whole trainings on simulated devices: the checks of training_checks.py, each as a test; and a model of 7 B."""

import json
from pathlib import Path

import pytest

from tests import models
from tests.simulation.child import checks_in, results_of, run_script

CHECKS = Path(__file__).with_name("training_checks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of the checks, on a small untied Llama."""
    folder = tmp_path_factory.mktemp("training")
    return results_of(CHECKS, folder, str(models.saved_llama(folder / "model")))


@pytest.mark.parametrize("name", checks_in(CHECKS))
def test_training(results, name):
    """Training on simulated devices does what the name of the check says, with the losses of the plain CPU."""
    assert results[name] is None, results[name]


def test_a_model_of_seven_billion_trains_by_its_shapes(tmp_path):
    """Two steps of Qwen2.5-7B in bfloat16 have the right peaks, and take less than 2 GiB and a minute here.

    The first device holds 3.62 GiB of weights, as much of gradients, and twice that of optimizer state; the two in the
    middle 4.78 GiB of each, and some activations; the last one 1.02 GiB of each, and the logits and what the loss
    makes of them.
    """
    script = Path(__file__).with_name("big_model.py")
    done = run_script(script, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peaks"] == pytest.approx([14.5, 19.7, 19.7, 6.5], rel=0.03)
    assert result["resident"] < 2 and result["seconds"] < 60
