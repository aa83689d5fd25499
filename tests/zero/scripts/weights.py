"""A script that looks at its weights, changes some, resizes the vocabulary as run_clm does, and trains.

python weights.py --model FOLDER --output FOLDER --losses FILE [--batch-size 2]
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
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=3, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
)  # fmt: skip
set_seed(42)
model = AutoModelForCausalLM.from_pretrained(options.model)
weight = model.get_input_embeddings().weight
tokens = 100  # fewer than the embedding has
if tokens > weight.shape[0]:
    model.resize_token_embeddings(tokens)
seen = {
    "shape": str(tuple(weight.shape)), "size": str(tuple(weight.size())), "dim": weight.dim(), "len": len(weight),
    "numel": weight.numel(),
    "counted": model.num_parameters(), "footprint": model.get_memory_footprint(),
    "parameters": sum(parameter.numel() for parameter in model.parameters()), "layers": model.lm_head.weight.ndim,
}  # fmt: skip
with torch.no_grad():
    seen["norm"] = float(weight.norm())
    seen["mean"] = float(weight.float().mean())
    seen["value"] = weight[3, 4].item()
    weight[-5:] = weight[:-5].mean(0)
    model.lm_head.weight.mul_(0.5)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.1)
    seen["drawn"] = float(model.model.layers[0].mlp.up_proj.weight.abs().sum())
    seen["written"] = float(weight[-1].sum()) + float(model.lm_head.weight.sum())
try:
    torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight).sum().backward()
    weight.grad = None
    seen["with gradients"] = "computed"
except RuntimeError as error:
    seen["with gradients"] = str(error)

state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
seen["state"] = str({name: tuple(tensor.shape) for name, tensor in state.items()})
seen["values"] = float(sum(tensor.float().abs().sum() for tensor in state.values()))
seen["missing"] = str(model.load_state_dict({name: tensor * 1.25 for name, tensor in state.items()}))
seen["loaded"] = float(weight.detach().norm())
model.load_state_dict(state)
seen["of a layer"] = float(model.model.layers[0].state_dict()["mlp.up_proj.weight"].norm())

sequences = [torch.randint(1, 100, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
matrices, vectors = (
    [parameter for parameter in model.parameters() if (parameter.ndim > 1) is wanted] for wanted in (True, False)
)
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-1}]
optimizer = torch.optim.AdamW(groups, lr=1e-3)
data = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
trainer.train()
seen["trained"] = float(sum(tensor.float().abs().sum() for tensor in trainer.model.state_dict().values()))
trainer.save_model(options.output)
if arguments.process_index == 0:
    logged = [*trainer.state.log_history, seen]
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in logged))
