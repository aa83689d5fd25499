"""Trains on data that nobody can look at beforehand, in many ways; writes what was seen, as JSON.

Run by test_batch_check.py: `python batch_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import random
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import balance_shim
from balance_shim import simulation
from balance_shim.placement import placed_models

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
results = {}


def example(number, length):
    ids = [(7 * number + 3 * place) % 500 for place in range(length)]
    return {"input_ids": ids, "labels": ids}


class Own(torch.utils.data.Dataset):
    """Examples of the given lengths in turn; notes who looks."""

    def __init__(self, lengths, count=64):
        self.lengths, self.count, self.looked = lengths, count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.looked += 1
        return example(number, self.lengths[number % len(self.lengths)])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, lengths):
        self.own = Own(lengths)

    def __iter__(self):
        return (self.own[number] for number in range(len(self.own)))


def collate(examples):
    longest = max(len(example["input_ids"]) for example in examples)

    def filled(name, value):
        return torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])

    mask = [[1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"])) for example in examples]
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": torch.tensor(mask)}


def of_numbers(numbers):
    return collate([example(number, 96) for number in numbers])


class InOrder(Trainer):
    """Takes rows as they come, and notes what steps run."""

    forwards = ()

    def _inner_training_loop(self, *args, **kwargs):
        self.forwards = []
        noting = self.model.register_forward_pre_hook(self.note, with_kwargs=True)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            noting.remove()

    def note(self, model, args, kwargs):
        if model.training:
            self.forwards.append([*kwargs["input_ids"].shape])

    def _get_train_sampler(self, *_, **__):
        return None if self.train_dataset is None else torch.utils.data.SequentialSampler(self.train_dataset)


class OwnLoss(InOrder):
    """Couples rows with each other: portions would change what it learns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        first = outputs.logits[:, -1].mean(-1)
        loss = outputs.loss + (first - first.mean()).square().mean()
        return (loss, outputs) if return_outputs else loss


class AtTheStart(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.random = [torch.rand(1).item(), random.random()]

    def on_train_end(self, *_, **__):
        self.after = [torch.rand(1).item(), random.random()]


class Unseen(torch.utils.data.Dataset):
    """Examples of a data set of the script's own, into which nobody looks before it is used."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        return self.examples[number]


def measured(prediction):
    return {"rows": len(prediction.predictions), "mean": float(prediction.predictions.astype("float64").mean())}


SEEN, UNSEEN = 1, 2  # whether the planner sees the data to evaluate on


def train(
    dataset,
    trainer_class=InOrder,
    steps=2,
    batch=2,
    lora=False,
    numbers=False,
    again=0,
    init=False,
    metrics=0,
    ragged=False,
    evaluated=200,
    **options,
):
    set_seed(7)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=steps, per_device_train_batch_size=batch, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3,
        **{"optim": "adamw_torch_fused", **options},
    )  # fmt: skip
    # The control is one device: under the library's map 4.x stops where the loss meets labels of another one.
    places = "auto" if balance_shim.status().armed else {"": 0}
    if init:
        given = {"model_init": lambda: AutoModelForCausalLM.from_pretrained(model_folder, device_map=places)}
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=places)
        if lora:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        given = {"model": model}
    seen = []
    if metrics:
        examples = [example(number, evaluated - 30 * ragged * (number % 4)) for number in range(10)]
        given["eval_dataset"] = examples if metrics == SEEN else Unseen(examples)
        given["compute_metrics"] = measured
        given["model"].register_forward_pre_hook(
            lambda model, args, kwargs: None if model.training else seen.append([*kwargs["input_ids"].shape]),
            with_kwargs=True,
        )
    set_seed(7)
    watch = AtTheStart()
    collator = of_numbers if numbers else collate
    trainer = trainer_class(args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[watch], **given)
    trainings = []
    for _ in range(1 + again):
        trainer.train()
        trainings.append(in_force(trainer))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "trainings": trainings,
        **trainings[-1],
        "forwards": trainer.forwards,
        "evaluated": seen,
        "metrics": [
            {name: value for name, value in entry.items() if name in ("eval_loss", "eval_rows", "eval_mean")}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        "looked": getattr(dataset, "looked", None),
        "random": [watch.random, watch.after],
        "peaks": [device.peak for device in simulation.usage()],
    }


def in_force(trainer):
    placed = placed_models.placed(trainer.model)
    model = trainer.model if placed is None else placed[0]
    return {
        "map": dict(getattr(model, "hf_device_map", {})),
        "on": {name: parameter.device.index for name, parameter in model.named_parameters() if "lora" not in name},
        "recomputed": sum(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()),
        "capacities": [] if placed is None else [device.capacity for device in placed[1].plan.devices],
        "notes": [] if placed is None else list(placed[1].plan.notes),
        "predicted": [] if placed is None else [device.predicted_peak for device in placed[1].plan.devices],
    }


def folds(lengths):
    """Train a model a fold, as scripts do: the names of the one before are still bound while the next one loads."""
    trainings = []
    for _ in range(3):
        set_seed(7)
        arguments = TrainingArguments(
            output_dir=str(result_path.parent / "out"), max_steps=2, per_device_train_batch_size=2, save_strategy="no",
            report_to=[], disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(model_folder, device_map="auto")
        trainer = Trainer(model=model, args=arguments, train_dataset=Own(lengths), data_collator=collate)
        trainer.train()
        trainings.append(in_force(trainer))
    return {"trainings": trainings}


def case(name, *args, run=train, mode="balanced", environ=None, **options):
    balance_shim.uninstall()
    gc.collect()
    simulation.reset_peaks()
    before = dict(os.environ)
    os.environ.update(environ or {})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = run(*args, **options)
        except Exception:
            outcome = {"failed": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if line.startswith("balance_shim")]
    results[name] = outcome


LONG = 320
CONFIGURED = {"BALANCE_SEQ_LEN": str(LONG)}
TIGHT = {"BALANCE_MAX_MEMORY": "22MiB", "BALANCE_LOSS": "full"}
LONGER = (16, 16, 160, 160, 170, 170)
GROWING = (16, 16, 16, 16, 240, 240, 240, 240, 330, 330, 330, 330)

case("own data set", Own([LONG]))
case("own data set, off", Own([LONG]), mode="off")
case("own data set, configured", Own([LONG]), environ=CONFIGURED)
case("stream", Stream([LONG]))
case("LoRA", Own([LONG]), lora=True)
case("LoRA, configured", Own([LONG]), lora=True, environ=CONFIGURED)
case("numbers", list(range(64)), numbers=True)
case("growing", Own(GROWING), batch=4, steps=3, environ=TIGHT)
case("growing, off", Own(GROWING), batch=4, steps=3, mode="off")
case("growing, rows coupled", Own(GROWING), OwnLoss, batch=4, steps=3, environ=TIGHT)
case("moves", Own(LONGER), steps=3, environ={"BALANCE_MAX_MEMORY": "11MiB", "BALANCE_LOSS": "full"})
case("moves, off", Own(LONGER), steps=3, mode="off")
case("recomputing", Own(LONGER), steps=3,
     environ={"BALANCE_MAX_MEMORY": "0=13MiB,1=13MiB,2=0", "BALANCE_GRADIENT_CHECKPOINTING": "auto"})  # fmt: skip
case("moved portions", Own(LONGER), steps=3, environ={"BALANCE_MAX_MEMORY": "8MiB", "BALANCE_LOSS": "full"})
case("ever longer", Own(range(20, 330, 10), count=31), batch=1, steps=31)
case("trained again", Own([LONG]), again=1)
case("model_init", Own([LONG]), init=True, again=1)
case("model_init, off", Own([LONG]), init=True, mode="off")
case("model_init, recomputing", Own([LONG]), init=True,
     environ={"BALANCE_MAX_MEMORY": "0=20MiB,1=20MiB,2=0", "BALANCE_GRADIENT_CHECKPOINTING": "auto"})  # fmt: skip
EVALUATED = {"metrics": SEEN, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
case("evaluated", [example(number, 32) for number in range(64)], **EVALUATED)
case("evaluated, off", [example(number, 32) for number in range(64)], mode="off", **EVALUATED)
SHORT = [example(number, 32) for number in range(64)]
NO_ROOM = {"BALANCE_MAX_MEMORY": "12MiB"}
case("evaluated in no room", SHORT, environ=NO_ROOM, **EVALUATED)
EVALUATED["metrics"] = UNSEEN
case("evaluated in portions", SHORT, ragged=True, environ={"BALANCE_MAX_MEMORY": "7MiB"}, **EVALUATED)
case("evaluated in portions, off", SHORT, ragged=True, mode="off", **EVALUATED)
EVALUATED["prediction_loss_only"] = True
case("loss in portions", SHORT, ragged=True, environ={"BALANCE_MAX_MEMORY": "7MiB"}, **EVALUATED)
# One row of 400 tokens cannot be split: on the device of the head there is room for it, or for two layers.
ROWS_OF_ONE = {**EVALUATED, "per_device_eval_batch_size": 1, "evaluated": 400}
TWO_DEVICES = {"BALANCE_MAX_MEMORY": "0=9MiB,1=9MiB,2=0", "BALANCE_SEQ_LEN": "32", "BALANCE_BATCH_SIZE": "2"}
case("evaluated on another map", SHORT, environ=TWO_DEVICES, **ROWS_OF_ONE)
case("evaluated on another map, off", SHORT, mode="off", **ROWS_OF_ONE)
TOO_SMALL = TWO_DEVICES | {"BALANCE_MAX_MEMORY": "0=7.5MiB,1=7.5MiB,2=0"}
case("evaluated where no map holds it", SHORT, environ=TOO_SMALL, **ROWS_OF_ONE)
case("folds", [LONG], run=folds)

result_path.write_text(json.dumps(results))
