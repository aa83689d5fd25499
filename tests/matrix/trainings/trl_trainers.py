"""TRL's trainers, each with the data that it asks for."""

import inspect
import sys

import trl
from common import MODELS, NAME, arguments, tokenizer, train, words
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

MODEL = str(MODELS / "llama")


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")


def rows(**columns):
    return Dataset.from_list([{name: make(row) for name, make in columns.items()} for row in range(32)])


PAIRS = {
    "prompt": lambda row: words(row, 8),
    "chosen": lambda row: " " + words(row + 1, 12),
    "rejected": lambda row: " " + words(row + 2, 6),
}


def of(name):
    """Return the trainer and its arguments' class, wherever this version keeps them."""
    places = [trl]
    if not hasattr(trl, f"{name}Trainer"):
        import importlib

        places.append(importlib.import_module(f"trl.experimental.{name.lower()}"))
    return tuple(getattr(places[-1], f"{name}{what}") for what in ("Trainer", "Config"))


def run(name, model, data, record=None, more=None, **chosen):
    trainer, config = of(name)
    settings = arguments(config, max_length=48, max_prompt_length=16, **chosen)
    if isinstance(model, str):
        settings.model_init_kwargs = {"device_map": "auto"}
    extra = more or {}
    if "ref_model" in inspect.signature(trainer).parameters:
        extra.setdefault("ref_model", None)
    train(trainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer(), **extra),
          **(record or {"kind": "CausalLM"}))  # fmt: skip


def sft():
    run("SFT", load(), rows(text=lambda row: words(row, 24 + row % 8)))


def sft_by_path():
    run("SFT", MODEL, rows(text=lambda row: words(row, 24 + row % 8)))


def dpo():
    run("DPO", load(), rows(**PAIRS))


def dpo_reference():
    run("DPO", load(), rows(**PAIRS), more={"ref_model": load()})


def dpo_by_path():
    run("DPO", MODEL, rows(**PAIRS))


def reward():
    model = AutoModelForSequenceClassification.from_pretrained(MODELS / "reward", device_map="auto")
    pairs = {"chosen": PAIRS["chosen"], "rejected": PAIRS["rejected"]}
    run("Reward", model, rows(**pairs), {"kind": "SequenceClassification"})


def kto():
    columns = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": lambda row: row % 2 == 0}
    run("KTO", load(), rows(**columns))


def grpo():
    """Its samples depend on the devices' generators, so its losses are not compared."""

    def length(completions, **_):
        return [float(len(text) % 7) for text in completions]

    chosen = {"num_generations": 2, "max_completion_length": 8, "use_vllm": False}
    record = {"kind": "CausalLM", "sampled": True}
    run("GRPO", load(), rows(prompt=PAIRS["prompt"]), record, {"reward_funcs": length}, **chosen)


def distillation():
    """Of a teacher's probabilities on the data's own answers: nothing is sampled."""
    data = rows(messages=lambda row: [{"role": "user", "content": words(row, 6)},
                                      {"role": "assistant", "content": words(row + 1, 12)}])  # fmt: skip
    run("GKD", load(), data, more={"teacher_model": load()}, lmbda=0.0, seq_kd=False, max_new_tokens=8)


getattr(sys.modules[__name__], NAME)()
