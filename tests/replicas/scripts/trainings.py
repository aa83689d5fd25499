"""Trainings as users write them; nothing in here knows of ranks or devices.

    trainings.py NAME MODEL_FOLDER OUTPUT_FOLDER

`ROWS` sequences per device, so that ranks and one process have the same global batch. The last line on standard output
of the first rank is a JSON object.
"""

import json
import os
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

NAME, MODEL, OUTPUT = sys.argv[1:4]
MICRO_BATCH = int(os.environ.get("MICRO_BATCH", "2"))
TOKENS = 96


def examples(count=48, ragged=False):
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        ids = torch.randint(3, 500, (TOKENS - (number % 5 * 8 if ragged else 0),), generator=generator)
        result.append({"input_ids": ids.tolist(), "labels": ids.tolist()})
    return result


def arguments(kind=TrainingArguments, **more):
    chosen = {
        "output_dir": OUTPUT,
        "per_device_train_batch_size": MICRO_BATCH,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "learning_rate": 1e-3,
        "seed": 1,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        **more,
    }
    return kind(**chosen)


def load(**more):
    return AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto", **more)


def plain():
    """Accumulation, evaluation, the best model at the end."""
    model = load()
    more = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    more |= {
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": 2,
    }
    return Trainer(model, arguments(**more), train_dataset=examples(), eval_dataset=examples(8))


def lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    return Trainer(model, arguments(), train_dataset=examples())


def checkpointing():
    model = load()
    return Trainer(model, arguments(gradient_checkpointing=True), train_dataset=examples())


def sft():
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": example["input_ids"]} for example in examples(ragged=True)])
    chosen = arguments(SFTConfig, max_length=TOKENS, gradient_checkpointing=False, bf16=False)
    chosen.model_init_kwargs = {"device_map": "auto"}
    return SFTTrainer(MODEL, chosen, train_dataset=data, processing_class=tokenizer())


def dpo():
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    texts = [" ".join(f"w{(number * step) % 490}" for step in range(1, 41)) for number in range(1, 97)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    data = Dataset.from_list([{"prompt": "w7 w8 ", "chosen": one, "rejected": other} for one, other in pairs])
    chosen = arguments(DPOConfig, gradient_checkpointing=False, bf16=False, max_length=TOKENS)
    return DPOTrainer(load(), None, args=chosen, train_dataset=data, processing_class=tokenizer())


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def resumed():
    """Goes on with the checkpoint that `plain` has left."""
    model = load()
    more = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 100}
    return Trainer(model, arguments(**more), train_dataset=examples())


trainer = globals()[NAME]()
trainer.train(resume_from_checkpoint=True if NAME == "resumed" else None)
history = trainer.state.log_history
trainer.save_model(os.path.join(OUTPUT, "saved"))
if trainer.is_world_process_zero():
    printed = {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "evaluations": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "processes": trainer.args.world_size,
        "devices": sorted({str(parameter.device) for parameter in trainer.model.parameters()}),
    }
    print(json.dumps(printed), flush=True)
