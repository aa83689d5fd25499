"""Distil a small model, with tied weights, from another one that no Trainer trains; reports how long ranks wait.

python teacher.py --model FOLDER --output FOLDER --losses FILE [--batch-size 2] [--clip 1.0]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--clip", type=float, default=1.0)
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=3, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    max_grad_norm=options.clip, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
)  # fmt: skip
set_seed(42)
student, teacher = (AutoModelForCausalLM.from_pretrained(options.model) for _ in range(2))
teacher.eval()


class Distilling(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            taught = teacher(input_ids=inputs["input_ids"].roll(1, 1)).logits
        loss = loss + (outputs["logits"] - taught).square().mean()
        return (loss, outputs) if return_outputs else loss


sequences = [torch.randint(1, 128, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
trainer = Distilling(
    student, arguments, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in sequences]
)
trainer.train()
student.save_pretrained(Path(options.output, "student"))
if arguments.process_index == 0:
    waits = {"ddp_timeout": arguments.ddp_timeout}
    if torch.distributed.is_initialized():
        group = torch.distributed.distributed_c10d._get_default_group()
        waits["group"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    logged = [*trainer.state.log_history, waits]
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in logged))
