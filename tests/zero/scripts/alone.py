"""A script that does on the first rank alone what all ranks have to do: `if rank == 0:` around one line.

python alone.py --model FOLDER --act merge|call|generate|embed|value|save|evaluate --other-rank leave|wait
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--act", required=True)
parser.add_argument("--other-rank", required=True)
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to=[],
    disable_tqdm=True,
)  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(options.model)
if options.act == "merge":
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
ids = torch.arange(3, 11).view(1, 8)
examples = [{"input_ids": ids[0], "labels": ids[0]} for _ in range(4)]
trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:2])
if options.act != "embed":  # of a model that no Trainer has trained
    trainer.train()
model.eval()
ACTS = {
    "merge": lambda: model.merge_and_unload(),
    "call": lambda: model(input_ids=ids),
    "generate": lambda: model.generate(input_ids=ids, max_new_tokens=2),
    "embed": lambda: model.get_input_embeddings()(ids),
    "value": lambda: model.get_output_embeddings().weight.norm(),
    "save": lambda: trainer.save_model(options.output),
    "evaluate": lambda: trainer.evaluate(),
}
if os.environ.get("RANK", "0") == "0":
    with torch.no_grad():
        ACTS[options.act]()
elif options.other_rank == "wait":
    torch.distributed.barrier()
