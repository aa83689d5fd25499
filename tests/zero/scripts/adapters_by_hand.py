"""Trains adapters for a step, saves them itself, merges them and saves that, as PEFT's own examples do."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
options = parser.parse_args()

set_seed(3)
arguments = TrainingArguments(
    output_dir=options.output, max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to=[],
    disable_tqdm=True,
)  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
examples = [{"input_ids": torch.arange(16) + index, "labels": torch.arange(16) + index} for index in range(8)]
Trainer(model=model, args=arguments, train_dataset=examples).train()
model.save_pretrained(options.output)
model.merge_and_unload().save_pretrained(options.output + "/merged")
