"""Trains a small model with the variables of the process, and writes what came of it.

Run by test_micro_batch.py and test_precision.py: `python micro_batch_cases.py FOLDER_OF_A_MODEL RESULT.json [words]`.
The word `unseen` hides the rows from the shim, `unlooked` the first batch too; `lora` trains adapters.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

model_folder, result_path, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
tokens = [list(range(3 + start, 3 + start + 128)) for start in range(32)]
examples = [{"input_ids": sequence, "labels": list(sequence)} for sequence in tokens]
for number, example in enumerate(examples):  # a different number of labels in each
    example["labels"] = [-100] * (number % 7) + example["labels"][number % 7 :]


class Unseen(torch.utils.data.Dataset):
    def __len__(self):
        return len(examples)

    def __getitem__(self, index):
        return examples[index]


if "unlooked" in options:
    from balance_shim.training import batch_check

    batch_check.looks_at = lambda trainer: False

set_seed(7)
arguments = TrainingArguments(
    output_dir=str(result_path.parent / "out"), max_steps=2, per_device_train_batch_size=8, logging_steps=1,
    gradient_accumulation_steps=2, save_strategy="no", report_to=[], disable_tqdm=True,
    **({"use_cpu": True} if "cpu" in options else {}),
)  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(model_folder, device_map=None if "cpu" in options else "auto")
loaded = str(next(model.parameters()).dtype)
if "lora" in options:
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
sizes, products = [], set()
model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
head = model.get_output_embeddings()
head.register_forward_hook(lambda _, __, output: products.add(str(output.dtype)))
trainer = Trainer(model=model, args=arguments, train_dataset=Unseen() if "unseen" in options else examples)
trainer.train()
result = {
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "steps": trainer.state.global_step,
    "sizes": sizes,
    "loaded": loaded,
    "products": sorted(products),
    "arguments": [arguments.bf16, arguments.fp16],
    "scaler": trainer.accelerator.scaler is not None,
}
result_path.write_text(json.dumps(result))
