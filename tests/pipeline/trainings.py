"""Trainings on simulated devices with and without `BALANCE_PIPELINE`, and how they are compared.

Imported by scripts of checks, which have installed the devices before.
"""

import contextlib
import gc
import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim

OUT = Path(tempfile.mkdtemp())
os.environ |= {"BALANCE_CACHE": str(OUT / "cache"), "BALANCE_STRICT": "1", "BALANCE_SEQ_LEN": "24"}


@dataclass
class Outcome:
    """What a training has shown.

    Attributes:
        losses: of each optimizer step, as logged.
        step_losses: what each call of `training_step` returned.
        gradients: of each optimizer step: name -> gradient on the host.
        said: what the shim has logged.
        forwards: how many forward passes had begun at the beginning of each backward pass.
        trainer: the trainer.
    """

    losses: list = field(default_factory=list)
    step_losses: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    said: str = ""
    forwards: list = field(default_factory=list)
    trainer: object = None


class _Gradients(TrainerCallback):
    def __init__(self, outcome, prepare, at_end):
        self.outcome, self.prepare, self.at_end = outcome, prepare, at_end

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.prepare:  # behind the dry runs, which take copies of the model with all hooks
            self.prepare(model)

    def on_train_end(self, *args, **kwargs):
        if self.at_end:
            self.at_end()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = [(name, each.grad) for name, each in model.named_parameters() if each.grad is not None]
        self.outcome.gradients.append({name: each.detach().cpu().clone() for name, each in named})


def train(
    pipeline, load, rows, kind=Trainer, arguments=TrainingArguments, prepare=None, at_end=None, wrap=None,
    trainer_options=None, **options,
):  # fmt: skip
    """Return the outcome of a training of two steps with `BALANCE_PIPELINE=pipeline`."""
    os.environ["BALANCE_PIPELINE"] = str(pipeline)
    balance_shim.uninstall()
    balance_shim.install()
    outcome, said = Outcome(), io.StringIO()
    options = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 3, "output_dir": str(OUT / "out"),
        **options,
    }  # fmt: skip
    with contextlib.redirect_stderr(said):
        set_seed(7)
        model = load()
        model = wrap(model) if wrap else model
        trainer = kind(
            model=model, args=arguments(**options), train_dataset=rows,
            callbacks=[_Gradients(outcome, prepare, at_end)], **(trainer_options or {}),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        _watch(trainer, outcome)
        trainer.train()
    outcome.said, outcome.trainer = said.getvalue(), trainer
    outcome.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    del trainer.training_step
    gc.collect()
    return outcome


def _watch(trainer, outcome):
    step, begun = trainer.training_step, []
    trainer.model.register_forward_pre_hook(lambda *_: begun.append(None))

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        outcome.step_losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    backward = trainer.accelerator.backward

    def counted(loss, **kwargs):
        outcome.forwards.append(len(begun))
        backward(loss, **kwargs)

    trainer.accelerator.backward = counted


def assert_same(one, other, tolerance=1e-6):
    """The two trainings had the same losses in each call, and the same gradients in each step."""
    assert len(one.step_losses) == len(other.step_losses) and len(one.gradients) == len(other.gradients)
    for first, second in zip(one.step_losses, other.step_losses, strict=True):
        assert abs(first - second) <= tolerance * max(1, abs(first)), (one.step_losses, other.step_losses)
    for first, second in zip(one.gradients, other.gradients, strict=True):
        assert first.keys() == second.keys() and first
        for name, gradient in first.items():
            scale = max(1.0, float(gradient.abs().max()))
            assert float((gradient - second[name]).abs().max()) <= tolerance * scale, name


def assert_in_flight(outcome, count, calls):
    """`count` forward passes had begun ahead of the first backward pass of each chunk of `calls` micro-batches."""
    assert outcome.forwards[0] == count and len(outcome.forwards) == calls, outcome.forwards


def tokens(count=8, length=24, vocabulary=500):
    torch.manual_seed(1)
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(0, vocabulary, (count, length))]
    for number, row in enumerate(rows):  # a different number of labels in each
        row["labels"][: number % 5] = -100
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    return rows
