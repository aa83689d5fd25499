"""Trains models with parts of the script's own around them on simulated devices; writes what was seen as JSON.

Run by test_around.py: `python around_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from pathlib import Path

import peft
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import balance_shim
from balance_shim import devices
from balance_shim.placement import colocations

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
LENGTH, SEQUENCES, STEPS, TOKENS = 96, 4, 3, 24
results = {}


class WithHead(torch.nn.Module):
    """A backbone with a head of the script's own, made at `model.device` as under the library's maps."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(backbone.config.hidden_size, 4, device=backbone.device)
        if hasattr(backbone, "hf_device_map"):
            self.hf_device_map = backbone.hf_device_map

    def forward(self, input_ids=None, labels=None, **_):
        logits = self.head(self.backbone(input_ids=input_ids).last_hidden_state[:, -1])
        return {"loss": torch.nn.functional.cross_entropy(logits, labels[:, 0] % 4), "logits": logits}


class WithProjector(torch.nn.Module):
    """A projector that trains, between the embedding of a frozen model and its layers."""

    def __init__(self, backbone):
        super().__init__()
        self.projector = torch.nn.Linear(
            backbone.config.hidden_size, backbone.config.hidden_size, device=backbone.device
        )
        self.backbone = backbone.requires_grad_(False)
        if hasattr(backbone, "hf_device_map"):
            self.hf_device_map = backbone.hf_device_map

    def forward(self, input_ids=None, labels=None, **_):
        embedded = self.projector(self.backbone.get_input_embeddings()(input_ids))
        return self.backbone(inputs_embeds=embedded, labels=labels)


def projector(device_map):
    return WithProjector(plain(device_map))


def own_head(device_map):
    return WithHead(AutoModel.from_pretrained(model_folder, device_map=device_map))


def plain(device_map):
    return AutoModelForCausalLM.from_pretrained(model_folder, device_map=device_map)


def learner(config_class, **options):
    def made(device_map):
        config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
        return peft.get_peft_model(plain(device_map), config)

    return made


def marked(device_map):
    """A frozen model whose inputs require gradients, with adapters in its last layer only."""
    model = plain(device_map)
    model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[5]))


def examples():
    made = [[(11 * number + 5 * place) % 500 for place in range(LENGTH)] for number in range(SEQUENCES * STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def collate(batch):
    return {name: torch.tensor([example[name] for example in batch]) for name in batch[0]}


def train(make, device_map="auto"):
    set_seed(7)
    model = make(device_map)
    base = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "backbone", model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.parameters():  # the same wherever they were made
            if parameter.requires_grad and not any(parameter is other for other in base.parameters()):
                parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=STEPS, per_device_train_batch_size=SEQUENCES,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2,
        remove_unused_columns=False,
    )  # fmt: skip
    first = dict(getattr(base, "hf_device_map", {}))
    at_load = str(base.device)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(), data_collator=collate)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    module = torch.get_device_module(devices.accelerator_type())
    gc.collect()
    for index in range(module.device_count()):
        module.reset_peak_memory_stats(index)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "first map": first,
        "map": dict(getattr(base, "hf_device_map", {})),
        "device": at_load,
        "embedding": str(base.get_input_embeddings().weight.device),
        "measured": [module.max_memory_allocated(index) for index in range(module.device_count())],
    }


def case(name, mode="balanced", **options):
    balance_shim.uninstall()
    colocations.forget()  # as a process of its own would
    gc.collect()
    report = result_path.parent / name.replace(" ", "_")
    os.environ["BALANCE_REPORT"] = str(report)
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(**options)
        except Exception as failure:
            outcome = {"error": str(failure), "traceback": traceback.format_exc()}
    outcome["log"] = stderr.getvalue().splitlines()
    with contextlib.suppress(OSError):
        outcome["plan"] = json.loads((report / "plan.json").read_text())
    results[name] = outcome


MAKERS = {
    "own head": own_head,
    "prompt tuning": learner(peft.PromptTuningConfig),
    "p-tuning": learner(peft.PromptEncoderConfig, encoder_hidden_size=32),
    "prefix tuning": learner(peft.PrefixTuningConfig),
    "marked inputs": marked,
    "projector": projector,
}


def main():
    for name, make in MAKERS.items():
        case(f"{name}, one device", mode="off", make=make, device_map=None)
        case(name, make=make)
    result_path.write_text(json.dumps(results))


main()
