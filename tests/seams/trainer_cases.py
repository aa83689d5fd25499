"""Seam 2 on simulated devices: trains a small model in several ways and writes what was seen, as JSON.

Run by test_trainer.py: `python trainer_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
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

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
examples = [{"input_ids": [token] * 24, "labels": [token] * 24, "attention_mask": [1] * 24} for token in range(5, 13)]
results = {}


class Counting(torch.utils.data.Dataset):
    """A data set that notices who looks."""

    looked = 0

    def __len__(self):
        return len(examples)

    def __getitem__(self, index):
        self.looked += 1
        return examples[index]


class OwnLoss(Trainer):
    """A trainer that computes its loss where the head is, as TRL 1.16 does, and keeps the divisor it was given."""

    divisors = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.divisors = (*self.divisors, type(num_items_in_batch).__name__)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.to(model.lm_head.weight.device)
        count = 1 if num_items_in_batch is None else num_items_in_batch
        labels = labels.flatten().to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        return loss / count


class OwnLossMoved(OwnLoss):
    """The same by an author who knows of devices."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if hasattr(num_items_in_batch, "to"):
            num_items_in_batch = num_items_in_batch.to(model.lm_head.weight.device)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Averaging(TrainerCallback):
    """Keeps a running average of the weights, begun before training."""

    def __init__(self, model):
        self.average = [parameter.detach().clone() for parameter in model.parameters()]

    def on_step_end(self, *_, model=None, **__):
        for average, parameter in zip(self.average, model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.1)


def train(
    trainer_class=Trainer,
    dataset=examples,
    device_map="auto",
    arguments_first=True,
    averaging=False,
    n_gpu=None,
    load=None,
    **options,
):
    def arguments():
        made = TrainingArguments(
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
        if n_gpu is not None:  # as CUDA has it: the number of its devices
            made.n_gpu  # noqa: B018  # which also sets it
            made._n_gpu = n_gpu
        return made

    made = arguments() if arguments_first else None
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=device_map, **(load or {}))
    set_seed(7)
    trainer = trainer_class(model=model, args=made or arguments(), train_dataset=dataset)
    seen = {}

    class Noting(TrainerCallback):
        def on_train_begin(self, *_, **__):
            seen["random"] = torch.rand(1).item()

    trainer.add_callback(Noting())
    if averaging:
        trainer.add_callback(Averaging(model))
    trainer.train()
    wrapped = [type(module).__name__ for module in (trainer.model_wrapped, trainer.model)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "wrapped": wrapped,
        "batch size": trainer.args.train_batch_size,
        "random number at the start": seen["random"],
        "rows read": getattr(dataset, "looked", None),
        "divisors": sorted(set(getattr(trainer, "divisors", ()))),
        "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
    }


def case(name, mode="balanced", environ=None, **options):
    balance_shim.uninstall()
    gc.collect()
    before = dict(os.environ)
    os.environ.update(environ or {})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(**options)
        except Exception as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if line.startswith("balance_shim")]
    results[name] = outcome


case("one device", mode="off", device_map={"": 0})
case("balanced")
case("arguments after the model", arguments_first=False)
lora = {"BALANCE_TUNING": "lora", "BALANCE_SEQ_LEN": "4096"}
case("planned for another workload", environ=lora)
case("planned for another workload, with an average of the weights", averaging=True, environ=lora)
case("as planned", environ={"BALANCE_SEQ_LEN": "24"})
head_apart = {"model": 0, "lm_head": 3}
case("own loss, off", mode="off", device_map=head_apart, trainer_class=OwnLoss)
case("own loss", device_map=head_apart, trainer_class=OwnLoss)
case("own loss that moves the count", device_map=head_apart, trainer_class=OwnLossMoved)
case("own loss, one device", mode="off", device_map={"": 0}, trainer_class=OwnLoss)
case("data set that counts", dataset=Counting())
case("data set that counts, off", mode="off", dataset=Counting(), device_map={"": 0})
case("no device map", device_map=None)
case("explicit map", device_map={"model": 0, "lm_head": 1})
case("map of one device", mode="map", environ={"BALANCE_DEVICE_MAP": '{"": 0}'}, n_gpu=4)
case("no device map, balanced", device_map=None, environ={"BALANCE_INTERCEPT": "auto,none"}, n_gpu=4)
case("device map, balanced", environ={"BALANCE_INTERCEPT": "auto,none"}, n_gpu=4)
queried = set()


def recording(original):
    def mem_get_info(device=None):
        queried.add(device)
        return original(device)

    return mem_get_info


torch.npu.mem_get_info, before = recording(torch.npu.mem_get_info), torch.npu.mem_get_info
case("two devices of four", load={"max_memory": {0: "500MiB", 2: "500MiB"}})
results["two devices of four"]["asked"] = sorted(queried - {None})
torch.npu.mem_get_info = before
case("does not fit", environ={"BALANCE_MAX_MEMORY": "1MiB"})
result_path.write_text(json.dumps(results))
