"""LoRA with evaluation, checkpoints and the best one at the end; a second start resumes from the newest checkpoint.

python best_adapters.py --model FOLDER --output FOLDER --result FILE [--steps 4] [--batch-size 1] [--accumulation 1]

Writes one JSON object: losses of the steps, the best checkpoint, and the norm of the adapters in the model at the end.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--result", required=True)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=1)
options = parser.parse_args()

set_seed(5)
arguments = TrainingArguments(
    options.output, max_steps=options.steps, per_device_train_batch_size=options.batch_size, logging_steps=1,
    gradient_accumulation_steps=options.accumulation, learning_rate=1e-2, lr_scheduler_type="constant",
    eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    per_device_eval_batch_size=2, report_to=[], disable_tqdm=True,
)  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
set_seed(6)
model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
sequences = [(torch.arange(24) * 3 + number) % 120 for number in range(24)]
data = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:12])
last = get_last_checkpoint(options.output) if Path(options.output).is_dir() else None
trainer.train(resume_from_checkpoint=last)
trainer.save_model(str(Path(options.output, "final")))
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(options.result).write_text(
        json.dumps({"losses": losses, "best": Path(trainer.state.best_model_checkpoint).name, "resumed": bool(last)})
    )
