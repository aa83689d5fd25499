"""Trains a small model on simulated devices with BALANCE_MONITOR=1, healthy and with planted faults; writes JSON.

Run by test_monitor.py: `python monitor_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`. The faults are in what a user
might write: a Trainer of their own, or a callback. Other processes are played by the simulation.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # on devices so small segments would decide, not what is planted

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim
from balance_shim import simulation

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
MIB = 1 << 20
results = {}
losses = []


def examples_of(*lengths):
    return [
        {"input_ids": [5 + number % 90] * length, "labels": [5 + number % 90] * length}
        for number, length in enumerate(lengths)
    ]


def collate(examples):
    longest = max(len(example["input_ids"]) for example in examples)
    padded = {"input_ids": 0, "labels": -100}
    return {
        key: torch.tensor([example[key] + [filler] * (longest - len(example[key])) for example in examples])
        for key, filler in padded.items()
    }


class KeepsLosses(TrainerCallback):
    """Computes a loss on the same rows after each step from the fourth on and keeps it for a plot, with its graph."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 4:
            ids = torch.arange(5, 29).expand(2, -1).to(args.device)
            losses.append(model(input_ids=ids, labels=ids).loss)


class TakesLess(Trainer):
    """Does what auto_find_batch_size is for: runs out of memory with eight rows, not with four."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().training_step(model, inputs, *args, **kwargs)


class KeepsStates(TrainerCallback):
    """Keeps the hidden states of a layer for later."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layer = model.get_submodule("model.layers.3")
        self.hook = layer.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.states.append((output[0] if isinstance(output, tuple) else output).detach())

    def on_train_end(self, *args, **kwargs):
        self.hook.remove()


class World(TrainerCallback):
    """Lets other processes take memory at a step."""

    def __init__(self, step, device, size):
        self.step, self.device, self.size = step, device, size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            simulation.occupy(self.device, others=self.size)


def train(
    trainer_class=Trainer,
    lengths=(24,) * 8,
    steps=12,
    callbacks=(),
    device_map="auto",
    evaluation=0,
    batch=2,
    **options,
):
    set_seed(7)
    more = {"eval_strategy": "steps", "eval_steps": evaluation} if evaluation else {}
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=steps, per_device_train_batch_size=batch,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **more, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=device_map)
    examples = examples_of(*lengths)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples if evaluation else None,  # one that is there is part of the plan
        data_collator=collate,
        callbacks=[*callbacks],
    )
    before = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    error = None
    try:
        trainer.train()
    except RuntimeError as failure:
        error = {
            "type": type(failure).__name__,
            "args": [str(argument) for argument in failure.args],
            "innermost": traceback.extract_tb(failure.__traceback__)[-1].name,
        }
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "callbacks left": [type(callback).__name__ for callback in trainer.callback_handler.callbacks] == before,
        "error": error,
        "peaks": [device.peak for device in simulation.usage()],
    }


def case(name, monitor="1", mode="balanced", room="8MiB", environ=None, others=None, **options):
    """Run one training. Devices are as large as `room`: the rest of each has somebody else."""
    balance_shim.uninstall()
    losses.clear()
    gc.collect()
    simulation.reset_peaks()
    before = dict(os.environ)
    report = result_path.parent / name.replace(" ", "_")
    os.environ.update({"BALANCE_MONITOR": monitor, "BALANCE_REPORT": str(report), **(environ or {})})
    for index, size in (others or {}).items():
        simulation.occupy(index, others=size)
    stderr, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(printed):
            balance_shim.install(mode=mode)
            outcome = train(**options)
    except Exception:
        outcome = {"failed": traceback.format_exc()}
    for index in range(4):
        simulation.occupy(index, others=0)
    os.environ.clear()
    os.environ.update(before)
    lines = report / "memory.jsonl"
    outcome["log"] = stderr.getvalue()
    outcome["printed"] = printed.getvalue()
    outcome["files"] = sorted(path.name for path in report.glob("*")) if report.exists() else []
    outcome["record"] = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    run, events = report / "run.json", report / "events.jsonl"
    outcome["run"] = json.loads(run.read_text()) if run.exists() else None
    outcome["events"] = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    outcome["picture"] = (report / "memory.svg").read_text() if (report / "memory.svg").exists() else ""
    fits = report / "device_map_that_fits.json"
    outcome["fits"] = json.loads(fits.read_text()) if fits.exists() else None
    results[name] = outcome


def user_map(**entries):
    layers = {f"model.layers.{number}": 0 for number in range(6)}
    return {"model.embed_tokens": 0, **layers, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1, **entries}


case("unwatched", monitor="0")
case("healthy")
case("varied, accumulated, evaluated", lengths=(8, 64, 16, 40, 24, 56, 12, 32), gradient_accumulation_steps=2,
     evaluation=4)  # fmt: skip
case("keeps losses", callbacks=[KeepsLosses()], steps=18)
case("keeps states", callbacks=[KeepsStates()], lengths=(64,) * 8, steps=13)
case("long batch", lengths=(16,) * 23 + (240,), steps=24, batch=1)
case("second process", callbacks=[World(5, 2, 3 * MIB)], steps=9)
case("half full", others={1: 4 * MIB}, steps=3)
case("finds a batch size", trainer_class=TakesLess, batch=8, steps=2, auto_find_batch_size=True)
case("memory runs out: long batch", lengths=(16,) * 23 + (1500,), steps=24, batch=1)
environ = {"BALANCE_DEVICE_MAP": json.dumps(user_map())}
case("memory runs out: map", mode="map", environ=environ, monitor="0", lengths=(160,) * 8)
case("memory runs out: explicit map", monitor="0", device_map=user_map(), lengths=(160,) * 8)
case("memory runs out: second process", callbacks=[World(3, 2, 7 * MIB)])
case("memory runs out: half full", mode="map", monitor="0", environ={"BALANCE_DEVICE_MAP": json.dumps(user_map())},
     lengths=(48,) * 8, others={0: 4 * MIB})  # fmt: skip
case("memory runs out: strict", mode="map", environ={**environ, "BALANCE_STRICT": "1"}, lengths=(160,) * 8)
result_path.write_text(json.dumps(results))
