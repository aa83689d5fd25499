"""A training in which one rank leaves out a layer in its second step, or does whatever else `--fault` says."""

import argparse
import os
import signal
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--output", required=True)
parser.add_argument("--fault", required=True, choices=["skip", "killed", "raises", "waits"])
options = parser.parse_args()

arguments = TrainingArguments(
    output_dir=options.output, max_steps=4, per_device_train_batch_size=1, logging_steps=1, save_strategy="no",
    report_to=[], disable_tqdm=True,
)  # fmt: skip
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=512,
)  # fmt: skip
model = LlamaForCausalLM(config)
examples = [{"input_ids": torch.arange(16) + index, "labels": torch.arange(16) + index} for index in range(64)]


class Faulty(Trainer):
    steps = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.steps += 1
        if self.steps == 2:
            os.write(1, f"rank {os.environ['RANK']} pid {os.getpid()} is in step 2\n".encode())  # whole lines
            self.fault(model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def fault(self, model):
        if options.fault == "waits":
            time.sleep(600)
        if os.environ["RANK"] != "1":
            return
        if options.fault == "skip":
            layers = model.module.model.layers
            model.module.model.layers = torch.nn.ModuleList([*layers[:1], *layers[2:]])
        elif options.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif options.fault == "raises":
            raise ValueError("a fault of the user's own")


Faulty(model=model, args=arguments, train_dataset=examples).train()
