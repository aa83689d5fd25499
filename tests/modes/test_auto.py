"""Mode `auto` in a training: the table, and what the choice does to the process. Which remedy is best: `placement`."""

import json
from pathlib import Path

import pytest

from tests import models, processes

TRAIN = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

arguments = TrainingArguments(
    {output!r}, max_steps=2, per_device_train_batch_size=int(os.environ.get("BATCH", 4)), report_to=[],
    gradient_accumulation_steps={accumulation}, save_strategy="no", disable_tqdm=True, logging_steps=1,
    learning_rate=1e-3, lr_scheduler_type="constant",
)
model = AutoModelForCausalLM.from_pretrained({model!r}, device_map="auto")
rows = [{{name: torch.arange(32) * (place + 1) % 500 for name in ("input_ids", "labels")}} for place in range(32)]
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
print("trained", arguments.world_size, arguments.n_gpu, sorted({{str(weight.device) for weight in model.parameters()}}))
if arguments.process_index == 0:
    print("losses", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
sys.exit(int(os.environ.get("ENDS", 0)))
"""
VARIABLES = {"BALANCE_MODE": "auto", "BALANCE_SEQ_LEN": "32", "OMP_NUM_THREADS": "1"}
DESCRIBED = str(Path(__file__).with_name("described_machine.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.saved_llama(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The losses of the script without the shim, in one process."""
    done = _run(model, tmp_path_factory.mktemp("plain"), BALANCE_MODE="off")
    return _losses(done)


def _run(model, folder, *before, accumulation=2, inline=False, ends=0, **variables):
    text = TRAIN.format(model=str(model), output=str(folder / "out"), accumulation=accumulation)
    script = folder / "train.py"
    script.write_text(text, encoding="utf-8")
    words = ("-c", text) if inline else (*before, str(script))
    paths = (processes.SHIM, processes.INJECTED)
    environment = {**VARIABLES, "BALANCE_CACHE": str(folder / "cache"), "ENDS": str(ends), **variables}
    done = processes.python(*words, paths=paths, cwd=folder, timeout=300, **environment)
    assert done.returncode == ends, done.stderr[-3000:]
    return done


def _losses(done):
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("losses")).partition(" ")[2])


def test_small_models_become_replicas(model, plain, tmp_path):
    """The table once; then the program runs again as that many ranks, which train and choose nothing again."""
    done = _run(model, tmp_path, BALANCE_SIMULATE="2xRTX3090", BATCH="2")
    assert done.stdout.count("trained 2") == 2
    assert done.stderr.count("candidates of mode auto:") == 1
    assert "mode auto chooses 2 replicas of a map: the fastest that fits" in done.stderr
    assert "ZeRO-3 does not run on simulated devices" in done.stderr
    assert _losses(done) == pytest.approx(plain, rel=1e-4)


def test_zero3_is_started_where_it_is_predicted_to_be_fastest(model, plain, tmp_path):
    """Real ranks with the losses of one process; variables that they do not take stop no strict one; its exit code."""
    done = _run(model, tmp_path, DESCRIBED, ends=3, BATCH="2", DESCRIBED="7000000", BALANCE_RESERVE="0",
                BALANCE_STRICT="1", BALANCE_PIPELINE="auto", BALANCE_REPLICAS="1")  # fmt: skip
    assert "mode auto chooses ZeRO-3 on 2 ranks: the fastest that fits" in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("candidates of mode auto:") == done.stderr.count("ZeRO-3 over 2 processes") == 1
    assert done.stdout.count("trained 2") == 2
    assert _losses(done) == pytest.approx(plain, rel=1e-4)


def test_a_program_that_cannot_be_repeated_stays_one_process(model, plain, tmp_path):
    """`python -c` and notebooks: of two fast devices one is the fastest for a small model."""
    done = _run(model, tmp_path, inline=True, BALANCE_SIMULATE="2xRTX3090")
    assert "mode auto chooses one device: the fastest that fits" in done.stderr
    assert "trained 1 1 ['npu:0']" in done.stdout, "and no copies of torch.nn.DataParallel"
    assert "python -c" in done.stderr and "BALANCE_PIPELINE is off" in done.stderr
    assert "balanced map, micro-batches in flight " in done.stderr or "balanced map, 2 micro-batches" in done.stderr
    assert _losses(done) == pytest.approx(plain, rel=1e-4)


def test_micro_batches_in_flight_are_chosen(model, plain, tmp_path):
    """Where one device is too small and `BALANCE_PIPELINE` lets it: with the losses of the plain script."""
    done = _run(model, tmp_path, inline=True, BALANCE_SIMULATE="2x5MiB@H100", BALANCE_PIPELINE="auto",
                BALANCE_RESERVE="0", BALANCE_CACHE="off")  # fmt: skip
    assert "mode auto chooses balanced map, 2 micro-batches in flight" in done.stderr, done.stderr[-3000:]
    assert "trained 1 1 ['npu:0', 'npu:1']" in done.stdout
    assert _losses(done) == pytest.approx(plain, rel=1e-4)


def test_without_known_speeds_it_is_the_balanced_map(model, plain, tmp_path):
    """Devices by size have no kind; what does not fit as it is gets its layers recomputed."""
    done = _run(model, tmp_path, inline=True, BALANCE_SIMULATE="2x1GiB", BALANCE_CACHE="off")
    assert "mode auto chooses balanced map: the first that fits" in done.stderr
    assert "trained 1 1 ['npu:0', 'npu:1']" in done.stdout
    assert _losses(done) == pytest.approx(plain, rel=1e-4)
