"""Two trainers whose arguments are made first; one evaluates before it trains, and the other one's loss is a mean.

python twice.py --output FOLDER --losses FILE [--batch-size 2]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
options = parser.parse_args()


def arguments(**more):
    return TrainingArguments(
        output_dir=options.output, max_steps=2, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
        per_device_eval_batch_size=options.batch_size, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, **more,
    )  # fmt: skip


set_seed(42)
first, second = arguments(max_grad_norm=0.1), arguments(gradient_accumulation_steps=2)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
writer = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
reader = BertForSequenceClassification(
    BertConfig(vocab_size=128, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=2, **sizes)
)
sequences = [torch.randint(128, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
unmasked = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
masked = [  # as answers of unequal length
    {"input_ids": sequence, "labels": torch.where(torch.arange(10) > index, sequence, -100)}
    for index, sequence in enumerate(sequences)
]
writing = Trainer(writer, first, train_dataset=masked, eval_dataset=unmasked)
reading = Trainer(
    reader,
    second,
    train_dataset=[{"input_ids": sequence, "labels": index % 2} for index, sequence in enumerate(sequences)],
)
writing.evaluate()
writing.train()
writing.evaluate()
reading.train()
if first.process_index == 0:
    logged = writing.state.log_history + reading.state.log_history
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in logged))
