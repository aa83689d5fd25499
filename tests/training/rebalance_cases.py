"""Trains a small model on a plan that is wrong because nobody can see its rows, with BALANCE_REBALANCE; writes JSON.

Run by test_rebalance.py: `python rebalance_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`. Peaks that are written are
those of the last steps, by which all that moves has moved.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim
from balance_shim import simulation
from balance_shim.training import batch_check

# Plans here are wrong by the length of rows, which is easy to set. With the first batch looked at they would not be.
batch_check.looks_at = lambda trainer: False

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
STEPS, SETTLED = 7, 5
results = {}


class Stream(torch.utils.data.IterableDataset):
    """Examples that nobody can look at before they are trained on."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __iter__(self):
        for number in range(200):
            length = self.lengths[number % len(self.lengths)]
            ids = [(7 * number + 3 * place) % 2000 for place in range(length)]
            yield {"input_ids": ids, "labels": ids}


class Watching(TrainerCallback):
    """Notes where parameters are at the start, and starts the peaks again when all has moved."""

    def on_train_begin(self, *_, model, **__):
        self.before = places(model)

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == SETTLED:
            simulation.reset_peaks()

    def on_train_end(self, *_, optimizer, **__):
        self.peaks = [device.peak for device in simulation.usage()]
        states = getattr(optimizer, "optimizer", optimizer).state
        pairs = [
            (parameter, name, value)
            for parameter, state in states.items()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        ]
        self.astray = sum(
            value.device != parameter.device for parameter, name, value in pairs if value.shape == parameter.shape
        )
        self.steps_on = sorted({value.device.type for _, name, value in pairs if name == "step"})
        self.moments = sum(name == "exp_avg" for _, name, _ in pairs)


class Hungry(TrainerCallback):
    """Has the layers from the fourth on keep more for their backward pass than planned, as a user's hook may."""

    def on_train_begin(self, *_, model, **__):
        for number, layer in enumerate(model.model.layers):
            if number >= 3:
                layer.register_forward_hook(self.keep_more)

    def keep_more(self, module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states + 0 * states.repeat(1, 1, 40).sigmoid().mean()
        return (states, *output[1:]) if isinstance(output, tuple) else states


def places(model):
    return {name: parameter.device.index for name, parameter in model.named_parameters()}


def train(lora=False, lengths=(256,), listed=False, own_optimizer=False, callbacks=(), **options):
    set_seed(7)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip
    model = placed = AutoModelForCausalLM.from_pretrained(model_folder, device_map="auto")
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    watching = Watching()
    dataset = Stream(lengths)
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-2), None)} if own_optimizer else {}
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(dataset) if listed else dataset,
        callbacks=[watching, *callbacks],
        **given,
    )
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    trainer.train()
    after = places(model)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "moved": sorted(name for name, place in after.items() if watching.before[name] != place),
        "peaks": watching.peaks,
        "astray": watching.astray,
        "steps on": watching.steps_on,
        "moments": watching.moments,
        "trained": sum(parameter.requires_grad for parameter in model.parameters()),
        "map": placed.hf_device_map,
        "callbacks left": [type(callback).__name__ for callback in trainer.callback_handler.callbacks] == callbacks,
    }


def case(name, rebalance="1", mode="balanced", environ=None, fail=None, **options):
    balance_shim.uninstall()
    gc.collect()
    simulation.reset_peaks()
    report = result_path.parent / name.replace(" ", "_")
    before = dict(os.environ)
    wrong = {"BALANCE_SEQ_LEN": "16", "BALANCE_REBALANCE": rebalance, "BALANCE_REPORT": str(report)}
    os.environ.update({**wrong, **(environ or {})})
    stderr, outcome = io.StringIO(), {}
    with (
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
        fail or contextlib.nullcontext(),
    ):
        try:
            balance_shim.install(mode=mode)
            outcome = train(**options)
        except Exception:
            outcome = {"failed": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if line.startswith("balance_shim")]
    outcome["plan"] = json.loads((report / "plan.json").read_text())
    outcome["written"] = json.loads((report / "device_map.json").read_text())
    results[name] = outcome


@contextlib.contextmanager
def failing_half_way():
    """Let the third tensor of a move fail, once."""
    from balance_shim.placement import move

    put, calls = move._put, []

    def third_fails(piece, device, undo):
        calls.append(piece)
        if len(calls) == 3:
            raise RuntimeError("planted")
        put(piece, device, undo)

    move._put = third_fails
    try:
        yield
    finally:
        move._put = put


@contextlib.contextmanager
def failing_plan():
    """Let planning with the measured figures fail."""
    from balance_shim.training import rebalance

    corrected = rebalance.corrected
    rebalance.corrected = None
    try:
        yield
    finally:
        rebalance.corrected = corrected


def pair(name, **options):
    case(f"{name}, off", rebalance="0", **options)
    case(name, **options)


pair("fused", optim="adamw_torch_fused")
pair("foreach", optim="adamw_torch")
pair("LoRA", lora=True)
pair("accumulation", gradient_accumulation_steps=2)
pair("bf16", bf16=True)
pair("hungry layers", callbacks=[Hungry()], environ={"BALANCE_SEQ_LEN": "256"})
pair("own optimizer", own_optimizer=True)
case("checkpointing chosen", environ={"BALANCE_GRADIENT_CHECKPOINTING": "auto"})
case("monitored", environ={"BALANCE_MONITOR": "1"})
case("as planned", environ={"BALANCE_SEQ_LEN": "256"})
case("as seen", listed=True)
case("short rows of a long plan", environ={"BALANCE_SEQ_LEN": "256"}, lengths=(16,))
case("long rows come late", lengths=(8,) * 6 + (256,) * 20)
user_map = {"model": 0, "lm_head": 1}
case("map", mode="map", environ={"BALANCE_DEVICE_MAP": json.dumps(user_map)})
case("move fails", fail=failing_half_way())
case("plan fails", fail=failing_plan())
result_path.write_text(json.dumps(results))
