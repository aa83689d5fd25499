"""Trainings of the table of combinations: two processes learn what one process without the shim learns."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from balance_shim.zero_support import TABLE
from tests import models
from tests.end_to_end.run import SHIM, run_command

pytestmark = pytest.mark.exhaustive

SCRIPT = Path(__file__).with_name("scripts") / "combinations.py"
TWO = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", "BALANCE_NCCL_TIMEOUT": "120"}
PROOF = "zero/test_combinations.py::test_trained["
KEYS = [key for key, entry in TABLE.items() if entry.proof.startswith(PROOF)]
PARAMETERS = [TABLE[key].proof.removeprefix(PROOF)[:-1] for key in KEYS]
LEAST_STEPS = 3
# bf16: autocast in one process, weights in bf16 with float32 masters under DeepSpeed.
TOLERANCES = {"bf16": 1e-3}
# Those whose losses differ from one process, as their note says; the row of the table has it.
DIFFERENT = ("matrix_optimizer",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Combination -> losses of one process, and of two with half the batch each; and what the two said."""
    folder = tmp_path_factory.mktemp("combinations")
    models.saved_llama(folder / "model", num_hidden_layers=2, vocab_size=128)
    losses = {}
    for name, launcher, variables, size in (("one", [], {}, "2"), ("two", SHIM, TWO, "1")):
        file = folder / f"{name}.json"
        arguments = ["--model", str(folder / "model"), "--output", str(folder / name), "--losses", str(file)]
        arguments += ["--batch-size", size, "--only", *PARAMETERS]
        outcome = run_command([sys.executable, *launcher, str(SCRIPT), *arguments], variables)
        outcome.expect_success()
        losses[name] = json.loads(file.read_text())
    return losses, outcome.stderr


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_trained(parameter, trained):
    """Same losses in each step, within 1e-4 (more where the script's precision is another); or noted, and finite."""
    if parameter.startswith("rloo") and Version(version("trl")) < Version("0.22"):
        pytest.skip("RLOOTrainer is another class before TRL 0.22")
    losses, stderr = trained
    one, two = losses["one"][parameter], losses["two"][parameter]
    assert isinstance(one, list), one
    assert isinstance(two, list), two
    key = next(key for key in KEYS if TABLE[key].proof == f"{PROOF}{parameter}]")
    assert len(one) == len(two) >= LEAST_STEPS and len(set(one)) > 1
    if key in DIFFERENT:
        assert all(map(math.isfinite, two)) and two != pytest.approx(one, rel=1e-4)
        assert TABLE[key].message.partition("}")[2][:40] in stderr
        return
    assert two == pytest.approx(one, rel=TOLERANCES.get(parameter, 1e-4), abs=1e-6)
