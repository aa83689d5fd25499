"""A script that copies its model and a layer, parametrizes a weight, reads gradients, and trains twice.

python copies.py --model FOLDER --output FOLDER --losses FILE [--batch-size 2]
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=3, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
)  # fmt: skip
set_seed(42)
model = AutoModelForCausalLM.from_pretrained(options.model)
ids = torch.arange(5, 15)[None]
seen = {}


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def loss_of(module):
    with torch.no_grad():
        return float(module(input_ids=ids, labels=ids).loss)


def norm(weight):
    return float(weight.detach().norm())


first = copy.deepcopy(model)  # before anything has called the model
seen["copy"] = loss_of(first)
with torch.no_grad():
    first.lm_head.weight.mul_(2)
seen["changed"] = [norm(first.lm_head.weight), norm(model.lm_head.weight)]
layer = copy.deepcopy(model.model.layers[0])
seen["layer"] = [*layer.mlp.up_proj.weight.shape, norm(layer.mlp.up_proj.weight)]
doubled = AutoModelForCausalLM.from_pretrained(options.model)
parametrize.register_parametrization(doubled.lm_head, "weight", Doubled())
seen["parametrized"] = loss_of(doubled)


class Reading(TrainerCallback):
    """Reads a gradient before each step, and keeps an average of the weights."""

    gradients = ()
    average = None

    def on_train_begin(self, args, state, control, model=None, **more):
        self.average = copy.deepcopy(model)  # DeepSpeed's engine has been made

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.gradients = (*self.gradients, norm(model.lm_head.weight.grad), norm(model.model.norm.weight.grad))

    def on_step_end(self, args, state, control, model=None, **more):
        assert model.lm_head.weight.grad is None
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.9).add_(weight, alpha=0.1)


sequences = [torch.randint(1, 100, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
data = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
reading = Reading()
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler), callbacks=[reading])
logged = []
for _ in range(2):  # the optimizer and the scheduler go on
    trainer.train()
    logged += trainer.state.log_history
    seen.setdefault("average", []).append(loss_of(reading.average))
seen["gradients"] = list(reading.gradients)
if arguments.process_index == 0:
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in [*logged, seen]))
