"""A loop of the script's own: with accelerate, or bare.

python own_loop.py --model FOLDER --output FOLDER --losses FILE [--batch-size 2] [--bare]
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--bare", action="store_true")
options = parser.parse_args()

set_seed(42)
model = AutoModelForCausalLM.from_pretrained(options.model)
sequences = [torch.randint(1, 128, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
if options.bare:
    model.train()
    model(input_ids=sequences[0][None], labels=sequences[0][None]).loss.backward()
accelerator = Accelerator()
loader = DataLoader(
    [{"input_ids": sequence, "labels": sequence} for sequence in sequences], batch_size=options.batch_size
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
logged = []
for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    logged.append({"loss": accelerator.gather(loss.detach()).mean().item()})
accelerator.unwrap_model(model).save_pretrained(options.output)
if accelerator.is_main_process:
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in logged))
