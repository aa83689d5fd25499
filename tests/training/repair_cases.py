"""Trains small models whose maps turn out not to run, on simulated devices, and writes what was seen as JSON.

Run by test_repair.py: `python repair_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.utils import ModelOutput

import balance_shim
from balance_shim.placement import colocations

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
STEPS = 4
results = {}


class Skips(LlamaForCausalLM):
    """Adds the embedding to what the layers give, outside of any module, where a batch asks for it."""

    def forward(self, input_ids=None, labels=None, skips=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        if skips is not None:
            hidden = hidden + self.model.embed_tokens(input_ids)
        logits = self.lm_head(hidden)
        labels = labels.to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return ModelOutput(loss=loss, logits=logits)


class ByTheHead(Trainer):
    """Meets the head's weight with that of the embedding in a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return loss + 1e-2 * (base.lm_head.weight * base.model.embed_tokens.weight).sum()


class AllLayers(Trainer):
    """Meets the weights of all layers, in a list that no variable holds."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        return loss + 1e-2 * torch.stack([layer.mlp.up_proj.weight for layer in model.model.layers]).square().mean()


class OnTheHost(Trainer):
    """Meets the host: a mistake of the script's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {loss.device} and cpu!"
        )


@dataclass
class Plain:
    """An output that is neither a mapping nor the library's."""

    values: torch.Tensor
    inner: dict


class Replaced(Trainer):
    """Replaces `forward`, as TRL's fused heads do, by one that leaves its outputs on the head's device."""

    form = "plain"

    def __init__(self, model=None, **kwargs):
        super().__init__(model=model, **kwargs)
        head, backbone, form = model.lm_head, model.model, self.form

        def forward(input_ids=None, labels=None, **_):
            hidden = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = head(hidden.to(head.weight.device))
            logs = torch.log_softmax(logits, -1)[:, :-1]
            picked = logs.gather(-1, labels[:, 1:, None].to(logs.device)).squeeze(-1)
            pair = [picked, (logs.exp() * logs).sum(-1)]
            return (
                Plain(picked, {"pair": pair}) if form == "plain" else ModelOutput(values=picked, inner={"pair": pair})
            )

        model.forward = forward

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        mask = torch.ones_like(inputs["labels"][:, 1:], dtype=torch.float32)
        return -(outputs.values * mask).mean() + 0.1 * (outputs.inner["pair"][1] * mask).mean()


class ReplacedOutput(Replaced):
    form = "output"


def examples(skipping):
    made = []
    for number in range(32):
        ids = [(11 * number + 5 * place) % 500 for place in range(24)]
        made.append({"input_ids": ids, "labels": ids, **({"skips": [1]} if skipping(number) else {})})
    return made


def collate(batch):
    return {
        name: torch.tensor([example[name] for example in batch])
        for name in batch[0]
        if all(name in example for example in batch)
    }


class InOrder:
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Unseen(torch.utils.data.Dataset):
    """Examples that nobody looks at before training."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return len(self.made)

    def __getitem__(self, index):
        return self.made[index]


def train(trainer_class=Trainer, model_class=AutoModelForCausalLM, skipping=lambda _: False, device_map="auto",
          lora=False, dropout=0.0, **options):  # fmt: skip
    set_seed(7)
    arguments = TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2, remove_unused_columns=False, **options,
    )  # fmt: skip
    model = placed = model_class.from_pretrained(model_folder, device_map=device_map, attention_dropout=dropout)
    first = dict(getattr(placed, "hf_device_map", {}))
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer = type("Ordered", (InOrder, trainer_class), {})(
        model=model, args=arguments, train_dataset=Unseen(examples(skipping)), data_collator=collate
    )
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "first map": first,
        "map": dict(getattr(placed, "hf_device_map", {})),
    }


def case(name, mode="balanced", environ=None, **options):
    balance_shim.uninstall()
    colocations.forget()  # as a process of its own would
    gc.collect()
    report = result_path.parent / name.replace(" ", "_")
    before = dict(os.environ)
    os.environ.update({"BALANCE_REPORT": str(report), **(environ or {})})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = train(**options)
        except Exception as failure:
            outcome = {"error": str(failure), "traceback": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if line.startswith("balance_shim")]
    with contextlib.suppress(OSError):
        outcome["plan"] = json.loads((report / "plan.json").read_text())
    results[name] = outcome


def main():
    one, off = {"device_map": None}, {"mode": "off"}
    late = {"model_class": Skips, "skipping": lambda number: number // 2 % 2 == 1}
    for name, options in {
        "late": late,
        "accumulation": {**late, "gradient_accumulation_steps": 3},
        "portions": {**late, "gradient_accumulation_steps": 2, "environ": {"BALANCE_MICRO_BATCH": "2"}},
        "own loss": {"trainer_class": ByTheHead},
        "own loss with LoRA": {"trainer_class": ByTheHead, "lora": True},
        "plain output": {"trainer_class": Replaced},
        "library's output": {"trainer_class": ReplacedOutput},
        "all layers": {"trainer_class": AllLayers},
    }.items():
        unset = {key: value for key, value in options.items() if key != "environ"}
        cached = {"BALANCE_CACHE": str(result_path.parent / f"cache {name}"), **options.get("environ", {})}
        case(f"{name}, one device", **{**unset, **one, **off})
        case(name, **{**options, "environ": cached})
    case("late, again", **late, environ={"BALANCE_CACHE": str(result_path.parent / "cache late")})
    complete_map = {"BALANCE_DEVICE_MAP": json.dumps({"": 0, "lm_head": 3})}
    case("user's map", mode="map", trainer_class=ByTheHead, environ=complete_map)
    case("host", trainer_class=OnTheHost)
    case("explicit", device_map={"": 0})
    result_path.write_text(json.dumps(results))


main()
