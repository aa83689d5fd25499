"""Real trainings on the card, by a plain Trainer, and what the plan predicts for them."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.plan import DevicePlan, evaluate
from balance_shim.placement.request import Request

from . import configs
from .card import LIMITLESS, Card, Peaks

STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "autocast": torch.float32, "bf16+autocast": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: a name in `configs.MODELS`.
        workload: with AdamW.
        precision: "bf16", "fp32", "autocast" (float32 weights), or "bf16+autocast".
        padded: whether sequences end in padding, so that attention gets a mask.
    """

    model: str
    workload: Workload
    precision: str = "bf16"
    padded: bool = False

    @property
    def title(self) -> str:
        workload = self.workload
        parts = [
            workload.tuning,
            self.precision,
            f"{workload.batch_size} x {workload.seq_len}",
            f"{workload.loss} loss",
        ]
        parts += ["checkpointing"] * workload.gradient_checkpointing + ["padded"] * self.padded
        return ", ".join(parts)


def case(model: str, precision: str = "bf16", padded: bool = False, **workload: Any) -> Case:
    fields = {"seq_len": 2048, "loss": "chunked", "optimizer": "adamw_torch_fused", **workload}
    return Case(model, Workload(**fields, autocast="autocast" in precision), precision, padded)


def batch_of(trial: Case) -> dict[str, torch.Tensor]:
    """Return a micro-batch of token ids; padded ones are cut by a different length each."""
    workload = trial.workload
    ids = torch.randint(10, 30000, (workload.batch_size, workload.seq_len))
    ids %= configs.MODELS[trial.model][1]["vocab_size"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if trial.padded:
        for number in range(workload.batch_size):
            length = workload.seq_len - 16 * number
            batch["attention_mask"][number, length:] = 0
            batch["labels"][number, length:] = -100
    return batch


def predicted(card: Card, trial: Case) -> DevicePlan:
    """Return what the plan has for one device that holds all of the model."""
    device = card.as_planned(0, LIMITLESS)
    model = configs.build(trial.model, DTYPES[trial.precision], "meta")
    batch = batch_of(trial) if trial.padded else None
    costed = planner.cost(Request(TrainingCase.of(model, trial.workload, batch=batch), (device,)))
    return evaluate("balanced", costed, {block.name: 0 for block in costed.blocks}, (device,)).devices[0]


def measured(card: Card, trial: Case) -> Peaks:
    """Return the peaks of the card over a training."""
    import transformers

    from balance_shim.training.chunked_loss import deferring_for_a_step

    workload = trial.workload
    model = _with_adapters(configs.build(trial.model, DTYPES[trial.precision], card.device), workload)

    class Chunking(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            chunked = workload.loss == "chunked"
            with deferring_for_a_step(model) if chunked else contextlib.nullcontext():
                return super().training_step(model, inputs, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=workload.batch_size, report_to=[],
            save_strategy="no", optim=workload.optimizer, bf16=workload.autocast, disable_tqdm=True,
            gradient_checkpointing=workload.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        examples = list(range(workload.batch_size * STEPS))
        batch = batch_of(trial)
        trainer = Chunking(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=lambda _: {**batch},  # type: ignore[arg-type]
        )
        with card.measured() as peaks:
            trainer.train()
    return peaks[0]


def _with_adapters(model: Any, workload: Workload) -> Any:
    if workload.tuning != "lora":
        return model
    import peft

    layers = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and "lm_head" not in name]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=layers))
    return adapted


def cases() -> list[Case]:
    """Return the cases of the truth part, those that the audit doubted first."""
    small, wide = ("Qwen2.5-0.5B", "Llama-3.2-1B, 8 layers"), ("Qwen2.5-7B, 2 layers", "Mistral-7B, 4 layers")
    trials = [
        case("Qwen2.5-7B, 2 layers"),
        case("Qwen2.5-7B, 2 layers", "fp32"),
        case("StableLM-2-1.6B, 8 layers", "bf16+autocast"),
        case("Pythia-1.4B, 8 layers", "bf16+autocast"),
        case("Llama-3.2-1B, 8 layers", padded=True, batch_size=4, seq_len=1001),
        case("Qwen2.5-7B, 2 layers", loss="full"),
    ]
    for tuning in ("full", "lora"):
        for precision in ("bf16", "autocast", "fp32"):
            for checkpointing in (False, True):
                trials += [
                    case(model, precision, tuning=tuning, gradient_checkpointing=checkpointing)
                    for model in (*small, *wide)
                ]
    return list(dict.fromkeys(trials))
