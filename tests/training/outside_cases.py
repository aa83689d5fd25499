"""Trains models with modules of the script's own around them, and evaluates, on simulated devices; writes JSON.

Run by test_outside.py: `python outside_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from copy import deepcopy
from pathlib import Path
from types import MethodType

import peft
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import ModelOutput

import balance_shim
from balance_shim.placement import colocations
from balance_shim.training import outside

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
LARGER_LAST = "0=20MiB,1=20MiB"  # so that norm and head are apart where they may be
SMALL_FIRST = "0=5MiB"  # so that the embedding is elsewhere
results = {}


class OwnHead(nn.Module):
    """A backbone with a head made at its `device`, as tutorials do it, or, with a map, at its first parameter's."""

    def __init__(self, backbone, mapped=False):
        super().__init__()
        self.backbone = backbone
        place = next(backbone.parameters()).device if mapped else backbone.device
        self.head = nn.Linear(backbone.config.hidden_size, 3).to(place)
        if mapped and hasattr(backbone, "hf_device_map"):
            self.hf_device_map = backbone.hf_device_map

    def forward(self, input_ids=None, kinds=None):
        hidden = self.backbone(input_ids=input_ids).last_hidden_state
        logits = self.head(hidden[:, -1])
        return ModelOutput(loss=nn.functional.cross_entropy(logits, kinds), logits=logits)


class OwnPrompt(nn.Module):
    """Puts a prompt made at the model's `device` ahead of what the embedding gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.prompt = nn.Parameter(0.1 * torch.ones(4, model.config.hidden_size).to(model.device))
        if hasattr(model, "hf_device_map"):
            self.hf_device_map = model.hf_device_map

    def forward(self, input_ids=None, labels=None):
        embedded = self.model.get_input_embeddings()(input_ids)
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        ignored = torch.full((len(labels), 4), -100, dtype=labels.dtype, device=labels.device)
        prompted = torch.cat([prompt, embedded], 1)
        return self.model(inputs_embeds=prompted, labels=torch.cat([ignored, labels], 1))


class Meets(Trainer):
    """Meets the weights of the first layer and the last in an evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss
        if not model.training:
            first, last = (model.model.layers[number].self_attn.q_proj.weight for number in (0, 5))
            loss = loss + 1e-2 * (first * last).sum().to(loss.device)
        return (loss, outputs) if return_outputs else loss


class Valued(Trainer):
    """Has a head of its own, at the model's `device` and an attribute of the model, on the returned hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True)
        values = model.value_head(outputs.hidden_states[-1].to(model.value_head.weight.device))
        return outputs.loss + values.square().mean().to(outputs.loss.device)


class Moves(TrainerCallback):
    """Moves the embedding after the first step, as re-balancing might."""

    def __init__(self, trainer, placed):
        self.trainer, self.placed = trainer, placed

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            outside.move_along(self.trainer, self.placed, {**self.placed.hf_device_map, "model.embed_tokens": 2})


def own_head(load):
    return OwnHead(load(AutoModel))


def own_head_with_map(load):
    return OwnHead(load(AutoModel), mapped=True)


def own_prompt(load):
    return OwnPrompt(load(AutoModelForCausalLM))


def prompt_tuning(load):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(load(AutoModelForCausalLM), config)


def modules_to_save(load):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"])
    return peft.get_peft_model(load(AutoModelForCausalLM), config)


def valued(load):
    model = load(AutoModelForCausalLM)
    model.value_head = nn.Linear(model.config.hidden_size, 1).to(model.device)
    return model


class Adapted(nn.Module):
    """A module of a layer with an adapter around it, made at `device`."""

    def __init__(self, inner, size, device):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(size, 8, device=device), nn.Linear(8, size, device=device)

    def forward(self, hidden):
        hidden = self.inner(hidden)
        return hidden + self.up(torch.relu(self.down(hidden)))


def new_head(load):
    model = load(AutoModelForCausalLM)
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size)  # on the host
    return model


def adapted(load):
    model = load(AutoModelForCausalLM)
    for layer in model.model.layers:
        layer.mlp = Adapted(layer.mlp, model.config.hidden_size, model.device)
    return model


def reordered(load):
    model = load(AutoModelForCausalLM)
    layers = [model.model.layers[number] for number in (5, 0, 3, 1)]
    model.model.layers = nn.ModuleList([*layers, deepcopy(layers[0])])
    return model


def lce_forward(self, input_ids=None, labels=None, **_):
    """Stand in for Liger's: a kernel in Triton that reads the head's weight, for which two devices are no good."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    weight, labels = self.lm_head.weight, labels.to(hidden.device)
    if weight.device != hidden.device:
        raise SystemError("illegal memory access")
    logits = hidden @ weight.t()
    return ModelOutput(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


lce_forward.__module__ = "liger_kernel.stand_in"


def fused(load):
    model = load(AutoModelForCausalLM)
    model.forward = MethodType(lce_forward, model)
    return model


def plain(load):
    return load(AutoModelForCausalLM)


def examples(count, kinds=False):
    made = []
    for number in range(count):
        ids = [(11 * number + 5 * place) % 500 for place in range(64)]
        named = {"kinds": number % 3} if kinds else {"labels": ids}
        made.append({"input_ids": ids, **named})
    return made


class Unseen(torch.utils.data.Dataset):
    """Examples that nobody looks at before training."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return len(self.made)

    def __getitem__(self, index):
        return self.made[index]


def train(make, device_map="auto", trainer_class=Trainer, steps=3, moves=False, **options):
    set_seed(7)
    placed = []

    def load(model_class):
        placed.append(model_class.from_pretrained(model_folder, device_map=device_map))
        return placed[0]

    model = make(load)  # ahead of the arguments: for a workload that is a guess
    first = dict(getattr(placed[0], "hf_device_map", {}))
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=max(steps, 1), per_device_train_batch_size=2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2,
        remove_unused_columns=False, label_names=["kinds" if make in (own_head, own_head_with_map) else "labels"],
        **options,
    )  # fmt: skip
    kinds = make in (own_head, own_head_with_map)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=examples(12, kinds), eval_dataset=Unseen(examples(4, kinds))
    )
    if moves:
        trainer.add_callback(Moves(trainer, placed[0]))
    if steps:
        trainer.train()
    else:
        trainer.evaluate()
    history = trainer.state.log_history
    outer = [
        parameter
        for name, parameter in model.named_parameters()
        if not any(parameter is own for own in placed[0].parameters())
    ]
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "first map": first,
        "map": dict(getattr(placed[0], "hf_device_map", {})),
        "layers": [str(next(layer.parameters()).device) for layer in getattr(placed[0], "model", placed[0]).layers],
        "devices": sorted({str(parameter.device) for parameter in placed[0].parameters()}),
        "outside": sorted({str(parameter.device) for parameter in outer}),
        "restored": "prediction_step" not in vars(trainer),
    }


def case(name, make, mode="balanced", caps="", cache="", **options):
    balance_shim.uninstall()
    colocations.forget()  # as a process of its own would
    gc.collect()
    before = dict(os.environ)
    os.environ.update({"BALANCE_MAX_MEMORY": caps} if caps else {})
    os.environ.update({"BALANCE_CACHE": str(result_path.parent / cache)} if cache else {})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(make, **options)
        except Exception as failure:
            outcome = {"error": str(failure), "traceback": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = stderr.getvalue()
    results[name] = outcome


def main():
    one = {"device_map": None, "mode": "off"}
    for make in (own_head, own_head_with_map, own_prompt, prompt_tuning, modules_to_save, valued):
        options = {"trainer_class": Valued} if make is valued else {}
        case(f"{make.__name__}, one device", make, **one, **options)
        case(f"{make.__name__}, small first", make, caps=SMALL_FIRST, **options)
    for make in (new_head, adapted, reordered):
        case(f"{make.__name__}, one device", make, **one)
        case(make.__name__, make)
    case("fused, one device", fused, **one)
    case("fused", fused, caps=LARGER_LAST)
    case("own_head, alike", own_head)
    case("prompt_tuning, moved", prompt_tuning, moves=True)
    for name, options in {
        "evaluated in training": {"eval_strategy": "steps", "eval_steps": 2},
        "evaluated alone": {"steps": 0},
    }.items():
        options["trainer_class"] = Meets
        case(f"{name}, one device", plain, **one, **options)
        case(name, plain, cache=name, **options)  # what one repairs, the other must not know
    result_path.write_text(json.dumps(results))


main()
