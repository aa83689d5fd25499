"""A small training in which one rank does something else at one moment: loading, a step, an evaluation, or saving.

python rank_fault.py --model FOLDER --output FOLDER [--fault FAULT --moment MOMENT --rank 1]; --make writes FOLDER.
"""

import argparse
import os
import signal
import sys
import time

print("moment start", flush=True)  # before anything heavy is imported, and before there are ranks

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="")
parser.add_argument("--make", action="store_true")
parser.add_argument("--rank", default="1")
parser.add_argument("--fault", default="none")
parser.add_argument("--moment", default="none")
options = parser.parse_args()


def arguments():
    """Made first: the one process becomes several here."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=options.output, max_steps=4, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip


if not options.make:
    arguments = arguments()

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer  # noqa: E402


class Seeing(LlamaForCausalLM):
    """Adds what a tower makes of pictures, where a batch has any, to the first positions."""

    def __init__(self, config):
        super().__init__(config)
        self.tower = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, config.hidden_size))
        self.post_init()

    def forward(self, input_ids=None, labels=None, pixels=None, detached=False, **kwargs):
        embedded = self.model.embed_tokens(input_ids)
        if pixels is not None:
            seen = self.tower(pixels)
            embedded = embedded + (seen.detach() if detached else seen)
        return super().forward(inputs_embeds=embedded, labels=labels, **kwargs)


if options.make:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    Seeing(LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=256)).save_pretrained(options.model)
    sys.exit()

RANK = os.environ["RANK"]


def at(moment):
    """Do what is planned for `moment`; returns whether this rank is to leave something out."""
    if options.moment != moment:
        return False
    os.write(1, f"moment {moment} of rank {RANK} pid {os.getpid()}\n".encode())  # whole lines
    if options.fault == "interrupted":
        time.sleep(3)
    if options.rank != RANK:
        return False
    if options.fault == "raises":
        raise ValueError("a planned fault")
    if options.fault == "exits":
        sys.exit(4)
    if options.fault == "finishes":
        sys.exit(0)
    if options.fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if options.fault == "sleeps":
        time.sleep(600)
    return True


class Faulty(Trainer):
    steps = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.steps += 1
        self.change(inputs, {1: "first step", 3: "later step"}.get(self.steps))
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.change(inputs, "evaluation")
        return super().prediction_step(model, inputs, *args, **kwargs)

    def change(self, inputs, moment):
        if not at(moment):
            return
        if options.fault == "skips":
            layers = self.model.model.layers
            if len(layers) == 4:
                self.model.model.layers = torch.nn.ModuleList([*layers[:1], *layers[2:]])
        elif options.fault == "lacks pictures":
            del inputs["pixels"]
        elif options.fault == "lacks gradients":
            inputs["detached"] = True


def example(index):
    ids = torch.arange(16) + index
    return {"input_ids": ids, "labels": ids, "pixels": torch.full((16, 32), index / 64)}


at("load")
model = Seeing.from_pretrained(options.model)
trainer = Faulty(
    model=model, args=arguments, train_dataset=[example(index) for index in range(64)],
    eval_dataset=[example(index) for index in range(8)],
)  # fmt: skip
trainer.train()
trainer.evaluate()
at("save")
model.save_pretrained(os.path.join(options.output, "saved"))
os.write(1, f"rank {RANK} has come to its end\n".encode())
