"""Fine-tune with the model loaded before there are TrainingArguments; reports what this process holds of it.

python model_first.py --model FOLDER --data ROWS.jsonl --output FOLDER --losses FILE [--resume]
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)


def share(model):
    """Return how many weights this process holds, how many there are, and how many of the parameters are divided."""
    parameters = list(model.parameters())
    held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    return {
        "held": held,
        "whole": total,
        "divided": sum(hasattr(parameter, "ds_id") for parameter in parameters),
        "of": len(parameters),
    }


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--save-steps", type=int, default=2)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

set_seed(42)
model = AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
report = {"loaded": share(model)}

tokenizer = AutoTokenizer.from_pretrained(options.model)
texts = [json.loads(line)["text"] for line in Path(options.data).read_text().splitlines()[:64]]
examples = [tokenizer(text, truncation=True, max_length=64) for text in texts]
arguments = TrainingArguments(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=options.batch_size,
    gradient_accumulation_steps=options.accumulation,
    learning_rate=2e-4,
    logging_steps=1,
    save_steps=options.save_steps,
    eval_strategy="steps",
    eval_steps=options.save_steps,
    load_best_model_at_end=True,
    average_tokens_across_devices=True,  # 4.x weighs processes otherwise, whatever the length of their rows
    report_to=[],
    disable_tqdm=True,
)


class SlowlyWritten(Trainer):
    def _save(self, *args, **kwargs):  # on the first rank; the others must not look for the files earlier
        time.sleep(0.5)
        super()._save(*args, **kwargs)


trainer = SlowlyWritten(
    model=model,
    args=arguments,
    train_dataset=examples,
    eval_dataset=examples[:8],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train(resume_from_checkpoint=options.resume)
report["trained"] = share(model)
report["world"] = {"asked": os.environ.get("WORLD_SIZE"), "arguments": arguments.world_size}
trainer.save_model(options.output)
model.save_pretrained(Path(options.output, "by-hand"))
if arguments.process_index == 0:
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
Path(options.output, f"rank-{arguments.process_index}.json").write_text(json.dumps(report))
