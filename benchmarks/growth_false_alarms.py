"""How often the monitor is alarmed by trainings that are healthy: twenty of them, each of another kind.

    python benchmarks/growth_false_alarms.py       # prints the table of docs/measurements.md; five minutes on two cores
    python benchmarks/growth_false_alarms.py NUMBER    # one of them, in this process

Each is an ordinary Trainer script on four simulated devices, small enough to take seconds, with BALANCE_MONITOR=1. The
devices are small, too, so that the monitor's thresholds, which are parts of a device, are as sharp as on large ones.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "shim"), str(REPOSITORY)]

DEVICES = "4x12MiB"
STEPS = 60

# What each training has of its own: arguments of the Trainer, and words that `_train` knows.
RUNS = [
    ("rows of one length", {}),
    ("lengths of 8 to 96 tokens", {"lengths": (8, 96)}),
    ("lengths of 8 to 96, another seed", {"lengths": (8, 96), "seed": 2}),
    ("few long rows among short ones", {"lengths": (8, 20), "long": 64}),
    ("short rows first, long rows last", {"lengths": (8, 96), "order": "rising"}),
    ("long rows first", {"lengths": (8, 96), "order": "falling"}),
    ("rows sorted by length in groups", {"lengths": (8, 96), "order": "groups"}),
    ("accumulation of 4", {"lengths": (8, 64), "gradient_accumulation_steps": 4, "steps": 24}),
    ("evaluation every 5 steps", {"lengths": (8, 64), "eval_strategy": "steps", "eval_steps": 5}),
    ("evaluation with larger batches", {"eval_strategy": "steps", "eval_steps": 20, "per_device_eval_batch_size": 8}),
    ("a checkpoint every 10 steps", {"lengths": (8, 64), "save_strategy": "steps", "save_steps": 10}),
    ("evaluation and checkpoints", {"eval_strategy": "steps", "eval_steps": 15, "save_strategy": "steps",
                                    "save_steps": 15, "lengths": (8, 64)}),
    ("LoRA", {"lora": True, "lengths": (8, 64)}),
    ("LoRA, accumulation, evaluation", {"lora": True, "gradient_accumulation_steps": 2, "eval_strategy": "steps",
                                        "eval_steps": 10, "steps": 40}),
    ("activation checkpointing", {"environ": {"BALANCE_GRADIENT_CHECKPOINTING": "1"}, "lengths": (8, 96)}),
    ("Adafactor", {"optim": "adafactor", "lengths": (8, 64)}),
    ("SGD without state", {"optim": "sgd", "lengths": (8, 64)}),
    ("layers that start training at step 20", {"unfreezes": 20, "lengths": (8, 64)}),
    ("losses kept as numbers, states for one step", {"records": True, "lengths": (8, 64)}),
    ("bfloat16 autocast, a batch of 4", {"bf16": True, "lengths": (8, 64), "per_device_train_batch_size": 4}),
]  # fmt: skip


def main() -> None:
    if len(sys.argv) > 2:
        _train(RUNS[int(sys.argv[1])][1], Path(sys.argv[2]))
        return
    chosen = [int(sys.argv[1])] if len(sys.argv) > 1 else range(len(RUNS))
    print("| training | steps | warnings | lines in the record |\n| --- | ---: | ---: | ---: |", flush=True)
    alarmed = 0
    for number in chosen:
        with tempfile.TemporaryDirectory() as folder:
            warnings, findings, steps = _watched(number, Path(folder))
        alarmed += bool(warnings or findings)
        print(f"| {RUNS[number][0]} | {steps} | {len(warnings)} | {len(findings)} |", flush=True)
        for text in {*warnings, *findings}:
            print(f"    {text}", file=sys.stderr)
    print(f"\n* runs with an alarm: {alarmed} of {len(chosen)}")


def _watched(number: int, folder: Path) -> tuple[list[str], list[str], int]:
    """Run one training in a process of its own; return its warnings, the findings in its record, and its steps."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("BALANCE_")}
    environ |= {
        "PYTHONPATH": str(REPOSITORY / "shim"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "BALANCE_SIMULATE": DEVICES, "BALANCE_MONITOR": "1", "BALANCE_REPORT": str(folder), "BALANCE_CACHE": "off",
        **RUNS[number][1].get("environ", {}),
    }  # fmt: skip
    start = "import balance_shim, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, __file__, str(number), str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{RUNS[number][0]} ended with {done.returncode}: {done.stderr[-3000:]}")
    record = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("balance_shim: warning")]
    return warnings, [finding["text"] for line in record for finding in line.get("findings", [])], len(record)


def _train(options: dict, folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    options = {**options}
    options.pop("environ", None)
    lora, unfreezes, records = (options.pop(name, None) for name in ("lora", "unfreezes", "records"))
    steps, seed = options.pop("steps", STEPS), options.get("seed", 1)
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, num_key_value_heads=2)).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", device_map="auto")
    batch = options.setdefault("per_device_train_batch_size", 2)
    count = steps * batch * options.get("gradient_accumulation_steps", 1)
    order = options.pop("order", "")
    examples = _rows(options.pop("lengths", (32, 32)), options.pop("long", None), order, count, random.Random(seed))
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))

    class Unfreezing(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            for layer in model.model.layers[:3]:
                layer.requires_grad_(False)

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == unfreezes:
                for layer in model.model.layers[:3]:
                    layer.requires_grad_(True)

    class Recording(TrainerCallback):
        """Keeps what a careful user keeps: numbers of all steps, tensors of the last one."""

        losses, states = [], {}

        def on_train_begin(self, args, state, control, **_):
            keep = lambda _, __, output: self.states.update(last=output)  # noqa: E731
            model.model.norm.register_forward_hook(keep)

        def on_step_end(self, args, state, control, **_):
            self.losses.append(float(self.states["last"].detach().float().mean()))
            self.states["last"] = self.states["last"].detach()

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=steps, logging_steps=5, report_to=[], disable_tqdm=True,
        **{"save_strategy": "no", "save_total_limit": 1, **options},
    )  # fmt: skip
    trainer = (InOrder if order else Trainer)(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:24], data_collator=_collate,
        callbacks=[*([Unfreezing()] if unfreezes else []), *([Recording()] if records else [])],
    )  # fmt: skip
    trainer.train()


def _rows(lengths, long, order, count, rng):
    sizes = [rng.randint(*lengths) for _ in range(count)]
    if long:
        sizes = [long if rng.random() < 0.15 else size for size in sizes]
    if order:
        sizes.sort(reverse=order == "falling")
    if order == "groups":
        groups = [sizes[start : start + 8] for start in range(0, count, 8)]
        rng.shuffle(groups)
        sizes = [size for group in groups for size in group]
    return [{"input_ids": [rng.randrange(5, 500) for _ in range(size)]} for size in sizes]


def _collate(examples):
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in ids]),
        "labels": torch.tensor([sequence + [-100] * (longest - len(sequence)) for sequence in ids]),
        "attention_mask": torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in ids]),
    }


if __name__ == "__main__":
    main()
