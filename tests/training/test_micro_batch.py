"""Rows in smaller or larger portions: other memory, the same steps and losses."""

import json
from pathlib import Path

import pytest

from tests import models
from tests.end_to_end.run import OFFLINE
from tests.processes import REPOSITORY, SHIM, python

CASES = Path(__file__).with_name("micro_batch_cases.py")
START = "import balance_shim, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
# Order of additions: sums of portions, and devices.
SAME = {"rel": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro-batch")
    models.saved_llama(folder / "model")
    return folder


def train(folder, *options, expected=0, **variables):
    """Run the script; return its result, or its standard error where it is expected to fail."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    done = python(
        "-c", START, str(CASES), str(folder / "model"), str(result), *options, paths=(SHIM, REPOSITORY), timeout=300,
        **{**OFFLINE, "CUDA_VISIBLE_DEVICES": "-1", **variables},
    )  # fmt: skip
    assert (done.returncode != 0) == bool(expected), done.stderr[-3000:]
    return done.stderr if expected else (json.loads(result.read_text()), done.stderr)


@pytest.fixture(scope="module")
def plain(folder):
    """The training on the CPU, with nothing of ours at work."""
    return train(folder, "cpu", BALANCE_MODE="off")[0]


def test_a_number_is_obeyed_and_the_effective_batch_stays(folder, plain):
    """Two rows at a time instead of eight: as many steps, the same losses."""
    result, _ = train(folder, BALANCE_SIMULATE="2x1GiB", BALANCE_MICRO_BATCH="2")
    assert plain["sizes"] == [8] * 4 and result["sizes"] == [2] * 16
    assert result["steps"] == plain["steps"] == 2
    assert result["losses"] == pytest.approx(plain["losses"], **SAME)


@pytest.mark.exhaustive
def test_a_number_that_does_not_divide_is_rounded_down(folder):
    """Six does not divide sixteen rows: four are taken, and said."""
    result, stderr = train(folder, "cpu", BALANCE_MODE="map", BALANCE_DEVICE_MAP='{"": 0}', BALANCE_MICRO_BATCH="6")
    assert set(result["sizes"]) == {4}
    assert "BALANCE_MICRO_BATCH=6 does not divide the effective batch of 16 sequences; using 4" in stderr


def test_auto_trains_where_the_library_alone_runs_out(folder, plain):
    """At a capacity at which "auto" dies, the largest micro-batch that is predicted to fit finishes with its losses."""
    tight = {"BALANCE_SIMULATE": "2x18MiB", "BALANCE_LOSS": "full"}
    assert "out of memory" in train(folder, expected=1, BALANCE_MODE="off", **tight)
    result, stderr = train(folder, BALANCE_MICRO_BATCH="auto", **tight)
    assert result["losses"] == pytest.approx(plain["losses"], **SAME) and result["steps"] == 2
    assert len(set(result["sizes"])) == 1 and result["sizes"][0] < 8
    assert "out of memory" not in stderr and "16 sequences per step" in stderr


@pytest.mark.exhaustive
def test_auto_takes_more_rows_where_there_is_room(folder, plain):
    """With room the whole effective batch goes at once, which the user's own arguments did not."""
    result, _ = train(folder, BALANCE_MICRO_BATCH="auto", BALANCE_SIMULATE="2x2GiB")
    assert set(result["sizes"]) == {16} and result["steps"] == 2
    assert result["losses"] == pytest.approx(plain["losses"], **SAME)


def test_a_step_that_runs_out_is_repeated_in_halves(folder, plain):
    """The rows are longer than the plan could know: portions halve until they fit, nothing is lost or counted twice."""
    variables = {"BALANCE_SIMULATE": "2x18MiB", "BALANCE_LOSS": "full", "BALANCE_SEQ_LEN": "8"}
    assert "out of memory" in train(folder, "unseen", "unlooked", expected=1, **variables)
    result, stderr = train(folder, "unseen", "unlooked", BALANCE_MICRO_BATCH="8", **variables)
    assert "run in 2 portions from now on; the step is repeated" in stderr
    assert result["losses"] == pytest.approx(plain["losses"], **SAME) and result["steps"] == 2
    assert result["sizes"][0] == 8 and result["sizes"][-1] < 8


@pytest.mark.exhaustive
def test_a_micro_batch_that_is_predicted_not_to_fit_never_runs(folder, plain):
    """The same with a look at the first batch: it is cut before it runs, and nothing runs out of memory."""
    variables = {"BALANCE_SIMULATE": "2x18MiB", "BALANCE_LOSS": "full", "BALANCE_SEQ_LEN": "8"}
    result, stderr = train(folder, "unseen", **variables)
    assert "out of memory" not in stderr and "run in portions" in stderr
    assert result["losses"] == pytest.approx(plain["losses"], **SAME) and result["steps"] == 2
    assert max(result["sizes"]) < 8
