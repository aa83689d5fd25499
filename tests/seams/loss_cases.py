"""BALANCE_LOSS on simulated devices: trains a small model in several ways and writes what was seen, as JSON.

Run by test_loss.py: `python loss_cases.py FOLDER_OF_A_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim
from balance_shim import log, simulation
from balance_shim.logits import chunks
from balance_shim.placement import placed_models

chunks.CHUNK_BYTES = 32 * chunks.BYTES_PER_LOGIT * 4096
chunks.MOST_CHUNKS_IN_TRAINING = 1000
model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
TOKENS = 128
torch.manual_seed(3)
examples = [{"input_ids": ids, "labels": [-100] * 9 + ids[9:]} for ids in torch.randint(3, 4000, (8, TOKENS)).tolist()]
results = {}


class Reading(Trainer):
    """A trainer that looks at the logits of every step, by a way that chunks know nothing of."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.seen = [*getattr(self, "seen", []), outputs.logits.detach().float().std().item()]
        return (loss, outputs) if return_outputs else loss


class WithoutLabels(Trainer):
    """A trainer whose batches have no labels, as in preference training."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(**inputs).logits
        self.seen = type(logits).__name__
        labels = inputs["input_ids"].flatten().to(logits.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)


class StartOfPeaks(TrainerCallback):
    def on_step_begin(self, *_, **__):
        gc.collect()
        simulation.reset_peaks()


def train(trainer_class=Trainer, device_map="auto", with_labels=True, evaluates=False, **options):
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=device_map)
    set_seed(7)
    data = examples if with_labels else [{"input_ids": example["input_ids"]} for example in examples]
    trainer = trainer_class(model, arguments, train_dataset=data, callbacks=[StartOfPeaks()])
    trainer.train()
    peaks = [device.peak for device in simulation.usage()]
    placed = placed_models.placed(trainer.model)
    plan = placed and placed[1].plan
    first_device = model.lm_head.weight.device.index
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "head": first_device,
        "peaks": peaks,
        "predicted": plan and [device.predicted_peak for device in plan.devices],
        "loss planned": plan and plan.workload.loss,
        "method": plan and plan.method,
        "seen": getattr(trainer, "seen", None),
        "evaluated": trainer.evaluate(data[:2])["eval_loss"] if evaluates else None,
    }


def case(name, mode="balanced", environ=None, **options):
    balance_shim.uninstall()
    gc.collect()
    log._said.clear()  # each case is a program of its own
    before = dict(os.environ)
    os.environ.update({"BALANCE_SEQ_LEN": str(TOKENS), "BALANCE_BATCH_SIZE": "2", **(environ or {})})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(**options)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if "balance_shim" in line or "BALANCE_" in line]
    results[name] = outcome


full, chunked = {"BALANCE_LOSS": "full"}, {"BALANCE_LOSS": "chunked"}
case("full", environ=full, evaluates=True)
case("auto", evaluates=True)
case("auto, bf16", bf16=True)
case("full, smoothed", environ=full, label_smoothing_factor=0.1)
case("auto, smoothed", label_smoothing_factor=0.1)
case("auto, explicit map", device_map={"": 0})
case("chunked, explicit map", device_map={"": 0}, environ=chunked)
case("auto, read", trainer_class=Reading)
case("auto, no labels", trainer_class=WithoutLabels, with_labels=False)
result_path.write_text(json.dumps(results))
