"""Unmodified scripts with BALANCE_MONITOR=1, and on devices that are too small, with Trainer and with TRL."""

import json
import textwrap

import pytest

from tests.end_to_end.run import SHIM, run_script
from tests.end_to_end.test_trainers import trl_arguments
from tests.sampling import sampled

WATCHED = {"BALANCE_SIMULATE": "4x2GiB", "BALANCE_MODE": "balanced", "BALANCE_MONITOR": "1"}


def record_of(folder):
    return [json.loads(line) for line in (folder / "report" / "memory.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def arguments(tiny, text):
    return ["--model", str(tiny), "--data", str(text), "--accumulation", "2", "--save"]


@pytest.fixture(scope="module", params=sampled(["plain_trainer.py", "trl_sft.py"], "plain_trainer.py"))
def watched(request, arguments, tmp_path_factory):
    """(script, its arguments, what came of it, the folder that it wrote to)"""
    argv = trl_arguments(arguments) if request.param.startswith("trl") else arguments
    folder = tmp_path_factory.mktemp("watched")
    return (
        request.param,
        argv,
        run_script(request.param, argv, folder, WATCHED, SHIM).expect_success(),
        folder,
    )


def test_a_script_is_watched(watched):
    """Each step is on record with its tokens, prediction stands beside measurement, and nothing is alarming."""
    _, _, outcome, folder = watched
    record = record_of(folder)
    assert [line["step"] for line in record] == [1, 2, 3, 4] and not any("findings" in line for line in record)
    assert {line["tokens"] for line in record} == {2 * 2 * 128}
    for index, peak in enumerate(outcome.peaks):
        figures = [line["devices"][f"npu:{index}"] for line in record]
        assert 0 < max(usage["peak"] for usage in figures) <= peak
    assert "memory of this training" in outcome.stderr and "memory of this training" not in outcome.stdout
    assert (folder / "report" / "memory.svg").read_text().startswith("<svg")
    assert "balance_shim: warning" not in outcome.stderr and "already one" not in outcome.stderr
    state = json.loads(next((folder / "output").glob("checkpoint-*/trainer_state.json")).read_text())
    assert set(state["stateful_callbacks"]) == {"TrainerControl"}


def test_memory_that_runs_out_is_explained(watched, tmp_path):
    """Device, phase and remedies, or that there are none, are on standard error before the script's own traceback."""
    script, arguments, outcome, _ = watched
    small = {"BALANCE_SIMULATE": f"4x{int(0.55 * max(outcome.peaks)) // 1024}KiB", "BALANCE_MODE": "balanced"}
    outcome = run_script(script, arguments, tmp_path, small, SHIM)
    assert outcome.exit_code == 1 and "out of memory" not in outcome.stdout
    output, _, rest = outcome.stderr.partition("balance_shim: error: out of memory on npu:")
    assert "torch.OutOfMemoryError" not in output and " pass" in rest.partition("\n")[0]
    remedies = "remedy 1: " in rest or "no setting of the shim would have fit" in rest
    assert "measured" in rest and remedies, outcome.tail()
    assert "OutOfMemoryError: Simulated device out of memory." in rest
    assert not (tmp_path / "report" / "memory.jsonl").exists()


LOGS_TO_TENSORBOARD = """
import sys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model, output = sys.argv[1], sys.argv[sys.argv.index("--output") + 1]
rows = [{"input_ids": [5 + row] * 16, "labels": [5 + row] * 16} for row in range(16)]
arguments = TrainingArguments(output_dir=output, max_steps=4, logging_steps=2, save_strategy="no",
                              report_to=["tensorboard"], disable_tqdm=True)
Trainer(model=AutoModelForCausalLM.from_pretrained(model, device_map="auto"), args=arguments,
        train_dataset=rows).train()
"""


@pytest.mark.swift  # the one environment that has tensorboard
def test_tensorboard_has_memory_beside_the_loss(tiny, tmp_path):
    """In the run's own event file, and no second one, there is each device's memory at the steps of the logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LOGS_TO_TENSORBOARD))
    folder = tmp_path / "run"
    logs = {"TENSORBOARD_LOGGING_DIR": str(folder / "logs"), "BALANCE_REPORT": "text"}
    run_script(script, [str(tiny)], folder, {**WATCHED, **logs}, SHIM).expect_success()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0].parent)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    for index in range(4):
        scalars = events.Scalars(f"memory_GiB/npu:{index}/peak")
        assert [scalar.step for scalar in scalars] == [2, 4] and all(0 < scalar.value < 2 for scalar in scalars)
    # Without a report folder the record is in the Trainer's.
    assert len((folder / "output" / "memory.jsonl").read_text().splitlines()) == 4
