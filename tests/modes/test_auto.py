"""Mode `auto` in a training: the table, and what the choice does to the process. Which remedy is best: `placement`."""

import pytest

from tests import models, processes

TRAIN = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

arguments = TrainingArguments(
    {output!r}, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
    save_strategy="no", disable_tqdm=True, logging_steps=1,
)
model = AutoModelForCausalLM.from_pretrained({model!r}, device_map="auto")
rows = [{{"input_ids": torch.arange(32), "labels": torch.arange(32)}}] * 16
Trainer(model=model, args=arguments, train_dataset=rows).train()
print("trained", arguments.world_size, arguments.n_gpu, sorted({{str(each.device) for each in model.parameters()}}))
"""
VARIABLES = {"BALANCE_MODE": "auto", "BALANCE_SEQ_LEN": "32", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.saved_llama(tmp_path_factory.mktemp("model") / "model")


def _run(model, folder, *arguments, **variables):
    script = folder / "train.py"
    script.write_text(TRAIN.format(model=str(model), output=str(folder / "out")), encoding="utf-8")
    words = arguments or (str(script),)
    paths = (processes.SHIM, processes.INJECTED)
    done = processes.python(*words, paths=paths, cwd=folder, **VARIABLES, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_small_models_become_replicas(model, tmp_path):
    """The table once; then the program runs again as that many ranks, which train and choose nothing again."""
    done = _run(model, tmp_path, BALANCE_SIMULATE="2xRTX3090", BALANCE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.count("trained 2") == 2
    assert done.stderr.count("candidates of mode auto:") == 1
    assert "mode auto chooses 2 replicas of a map: the fastest that fits" in done.stderr
    assert "ZeRO-3 does not run on simulated devices" in done.stderr


def test_a_program_that_cannot_be_repeated_stays_one_process(model, tmp_path):
    """`python -c` and notebooks: of two fast devices one is the fastest for a small model."""
    text = TRAIN.format(model=str(model), output=str(tmp_path / "out"))
    done = _run(model, tmp_path, "-c", text, BALANCE_SIMULATE="2xRTX3090", BALANCE_CACHE=str(tmp_path / "cache"))
    assert "mode auto chooses one device: the fastest that fits" in done.stderr
    assert "trained 1 1 ['npu:0']" in done.stdout, "and no copies of torch.nn.DataParallel"
    assert "python -c" in done.stderr and "BALANCE_PIPELINE is off" in done.stderr


def test_without_known_speeds_it_is_the_balanced_map(model, tmp_path):
    """Devices by size have no kind; what does not fit as it is gets its layers recomputed."""
    done = _run(model, tmp_path, "-c", TRAIN.format(model=str(model), output=str(tmp_path / "out")),
                BALANCE_SIMULATE="2x1GiB", BALANCE_CACHE="off")  # fmt: skip
    assert "mode auto chooses balanced map: the first that fits" in done.stderr
    assert "trained 1 1 ['npu:0', 'npu:1']" in done.stdout
