"""transformers' example scripts under zero3: the steps of run_clm, run_translation and run_classification."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.run import SHIM, run_command

pytestmark = pytest.mark.exhaustive

SCRIPT = Path(__file__).with_name("scripts") / "examples.py"
TWO = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", "BALANCE_NCCL_TIMEOUT": "120"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder, and what one process and two report of all tasks."""
    folder = tmp_path_factory.mktemp("examples")
    reports = {}
    for name, launcher, variables, size in (("one", [], {}, "2"), ("two", SHIM, TWO, "1")):
        file = folder / f"{name}.json"
        arguments = ["--models", str(folder / "models"), "--output", str(folder / name), "--losses", str(file)]
        command = [sys.executable, *launcher, str(SCRIPT), *arguments, "--batch-size", size]
        run_command(command, variables).expect_success()
        reports[name] = json.loads(file.read_text())
    return folder, reports


@pytest.mark.parametrize("task", ["clm", "translation", "classification"])
def test_learns_evaluates_and_saves_what_one_process_does(task, trained):
    """Losses within 1e-4, metrics and generated tokens are the same, and plain transformers loads the same shapes."""
    folder, reports = trained
    one, two = reports["one"][task], reports["two"][task]
    assert len(one["losses"]) == 3 and two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    assert one["embedding"] == two["embedding"] == 140
    assert two["shapes"] == one["shapes"] and two.get("predicted") == one.get("predicted")
    saved = [shapes(folder / name / task) for name in ("one", "two")]
    assert saved[0] == saved[1] and saved[0].items() <= {n: tuple(s) for n, s in one["shapes"].items()}.items()
    assert not loading_report(folder / "two" / task)


def shapes(folder):
    from safetensors.torch import load_file

    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def loading_report(folder):
    """Missing, unexpected and mismatched weights when plain transformers loads the model of `folder`."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    _, report = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    return {key: names for key, names in report.items() if names}
