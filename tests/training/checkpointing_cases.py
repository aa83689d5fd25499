"""Trains a small model with BALANCE_GRADIENT_CHECKPOINTING set in each way, on simulated devices; writes JSON.

Run by test_checkpointing.py: `python checkpointing_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
examples = [{"input_ids": [token] * 256, "labels": [token] * 256} for token in range(5, 13)]
results = {}


def train(lora=False, places="auto", **options):
    set_seed(7)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=places)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    runs, graded = {}, []

    def ran(name):
        runs[name] += 1
        graded.append(torch.is_grad_enabled())

    class Counting(TrainerCallback):
        """Counts, in the first step only, how often each layer runs."""

        def on_step_begin(self, *_, **__):
            if not runs:
                for name, module in model.named_modules():
                    if name.endswith(".self_attn"):
                        runs[name] = 0
                        module.register_forward_pre_hook(lambda *_, name=name: ran(name))

        def on_step_end(self, *_, **__):
            self.counted = self.counted if hasattr(self, "counted") else list(runs.values())

    counting = Counting()
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[counting])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "runs": counting.counted, "re-entrant": not graded[0]}


def case(name, value=None, room=None, mode="balanced", places=None, **options):
    balance_shim.uninstall()
    gc.collect()
    for variable, text in (("BALANCE_GRADIENT_CHECKPOINTING", value), ("BALANCE_MAX_MEMORY", room)):
        os.environ.pop(variable, None)
        if text:
            os.environ[variable] = text
    report = result_path.parent / name
    os.environ["BALANCE_REPORT"] = str(report)
    balance_shim.install(mode=mode)
    # Without the shim on one device: transformers 4.51 by itself fails where the loss is on another than the rows.
    places = places or ("auto" if mode != "off" else {"": 0})
    results[name] = train(places=places, **options)
    if places == "auto":
        plan = json.loads((report / "plan.json").read_text())
        results[name]["worst"] = max(device["predicted_peak"] for device in plan["devices"])


def between(most, least):
    """Return a room in which not all fits without recomputing: halfway, and as much more as is kept in reserve."""
    return f"{int((results[most]['worst'] + results[least]['worst']) / 2 / 0.92) // 1024}KiB"


case("without", mode="off")
case("without, LoRA", mode="off", lora=True)
case("on", "1")
case("off", "0", gradient_checkpointing=True)
case("auto, roomy", "auto", gradient_checkpointing=True)
case("auto, tight", "auto", room=between("auto, roomy", "on"))
case("off, LoRA", "0", lora=True)
case("on, LoRA", "1", lora=True)
case("auto, LoRA", "auto", room=between("off, LoRA", "on, LoRA"), lora=True)
case("on, LoRA, re-entrant", "1", lora=True, gradient_checkpointing_kwargs={"use_reentrant": True})
case("on, not placed", "1", places={"": 0})
case("on, not placed, LoRA", "1", places={"": 0}, lora=True)
case("off, not placed", "0", places={"": 0}, gradient_checkpointing=True)
result_path.write_text(json.dumps(results))
