"""A script that makes its folders as it goes: what each rank has is written to its own file beside `--report`.

python own_folders.py --model FOLDER --report FILE
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--report", required=True)
options = parser.parse_args()

set_seed(42)
student = AutoModelForCausalLM.from_pretrained(options.model)  # before there are arguments, so before their time-out
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), run_name=f"run of process {os.getpid()}", ddp_timeout=555, max_steps=2, save_steps=1,
    per_device_train_batch_size=1, report_to=[], disable_tqdm=True,
)  # fmt: skip
own = tempfile.mkdtemp()
shared = os.path.join(arguments.output_dir, "shared")
for folder in (own, shared):
    LlamaForCausalLM(LlamaConfig(**json.loads(Path(options.model, "config.json").read_text()))).save_pretrained(folder)
teachers = [AutoModelForCausalLM.from_pretrained(folder) for folder in (own, shared)]

sequences = [torch.randint(1, 128, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
trainer = Trainer(
    student, arguments, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in sequences]
)
trainer.train()
group = torch.distributed.distributed_c10d._get_default_group()
report = {
    "output_dir": arguments.output_dir,
    "run_name": arguments.run_name,
    "own": own,
    "checkpoints": sorted(path.name for path in Path(arguments.output_dir).glob("checkpoint-*")),
    "layers": [teacher.config.num_hidden_layers for teacher in teachers],
    "timeout": group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
}
Path(f"{options.report}.{arguments.process_index}").write_text(json.dumps(report))
