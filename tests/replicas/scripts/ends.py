"""A training of replicas in which the second rank meets with a fault in its second step, or all go on for long.

ends.py FAULT MODEL_FOLDER OUTPUT_FOLDER
"""

import os
import signal
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

FAULT, MODEL, OUTPUT = sys.argv[1:]


class Faulty(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            os.write(1, f"rank {os.environ['RANK']} pid {os.getpid()} is in step 2\n".encode())  # whole lines
        if state.global_step != 1 or (args.process_index == 0 and FAULT != "waits"):
            return
        if FAULT == "raises":
            raise ValueError("a fault of the user's own")
        if FAULT == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "leaves":
            sys.exit(4)
        time.sleep(100)


ids = torch.arange(32)
model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")
arguments = TrainingArguments(OUTPUT, max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True)
data = [{"input_ids": ids, "labels": ids}] * 64
Trainer(model, arguments, train_dataset=data, callbacks=[Faulty()]).train()
