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

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
results = {}


def row(number, length):
    ids = [(7 * number + 3 * place) % 500 for place in range(length)]
    return {"input_ids": ids, "labels": ids}


class Own(torch.utils.data.Dataset):
    """Rows of the given lengths in turn; notes who looks."""

    def __init__(self, lengths, rows=64):
        self.lengths, self.rows, self.looked = lengths, rows, 0

    def __len__(self):
        return self.rows

    def __getitem__(self, number):
        self.looked += 1
        return row(number, self.lengths[number % len(self.lengths)])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, lengths):
        self.own = Own(lengths)

    def __iter__(self):
        return (self.own[number] for number in range(len(self.own)))


def collate(rows):
    longest = max(len(each["input_ids"]) for each in rows)

    def filled(name, value):
        return torch.tensor([each[name] + [value] * (longest - len(each[name])) for each in rows])

    mask = [[1] * len(each["input_ids"]) + [0] * (longest - len(each["input_ids"])) for each in rows]
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": torch.tensor(mask)}


def of_numbers(numbers):
    return collate([row(number, 96) for number in numbers])


class InOrder(Trainer):
    """Takes rows as they come, and notes what steps run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forwards = []
        self.model.register_forward_pre_hook(self.note, with_kwargs=True)

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


def train(dataset, trainer_class=InOrder, steps=2, batch=2, lora=False, model=None, numbers=False, again=0, **options):
    set_seed(7)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=steps, per_device_train_batch_size=batch, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3,
        **{"optim": "adamw_torch_fused", **options},
    )  # fmt: skip
    model = placed = model or AutoModelForCausalLM.from_pretrained(model_folder, device_map="auto")
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    set_seed(7)
    watch = AtTheStart()
    collator = of_numbers if numbers else collate
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[watch]
    )
    for _ in range(1 + again):
        trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "map": dict(placed.hf_device_map),
        "forwards": trainer.forwards,
        "looked": getattr(dataset, "looked", None),
        "random": [watch.random, watch.after],
        "recomputed": sum(getattr(each, "gradient_checkpointing", False) is True for each in placed.modules()),
        "peaks": [device.peak for device in simulation.usage()],
    }


def case(name, *args, mode="balanced", environ=None, **options):
    balance_shim.uninstall()
    gc.collect()
    simulation.reset_peaks()
    before = dict(os.environ)
    os.environ.update(environ or {})
    said, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(*args, **options)
        except Exception:
            outcome = {"failed": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["said"] = [line for line in said.getvalue().splitlines() if line.startswith("balance_shim")]
    results[name] = outcome


LONG = 320
TOLD = {"BALANCE_SEQ_LEN": str(LONG)}
TIGHT = {"BALANCE_MAX_MEMORY": "22MiB", "BALANCE_LOSS": "full"}
GROWING = (16, 16, 16, 16, 240, 240, 240, 240, 330, 330, 330, 330)

case("own data set", Own([LONG]))
case("own data set, off", Own([LONG]), mode="off")
case("own data set, told", Own([LONG]), environ=TOLD)
case("stream", Stream([LONG]))
case("LoRA", Own([LONG]), lora=True)
case("LoRA, told", Own([LONG]), lora=True, environ=TOLD)
case("numbers", list(range(64)), numbers=True)
case("growing", Own(GROWING), batch=4, steps=3, environ=TIGHT)
case("growing, off", Own(GROWING), batch=4, steps=3, mode="off")
case("growing, rows coupled", Own(GROWING), OwnLoss, batch=4, steps=3, environ=TIGHT)
case("growing, recomputing", Own(GROWING), batch=4, steps=3,
     environ={**TIGHT, "BALANCE_GRADIENT_CHECKPOINTING": "auto"})  # fmt: skip
case("growing, micro-batches", Own(GROWING), batch=4, steps=3, environ={**TIGHT, "BALANCE_MICRO_BATCH": "auto"})
case("ever longer", Own([each for length in range(20, 330, 10) for each in (length,)], rows=31), batch=1, steps=31)
case("trained again", Own([LONG]), again=1)

result_path.write_text(json.dumps(results))
