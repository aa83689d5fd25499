"""A script of TRL's GRPO with a reward model, on whatever devices there are: `... MODEL FOLDER`."""

import json
import sys

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model, folder = sys.argv[1:]
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
config = transformers.AutoConfig.from_pretrained(model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
transformers.LlamaForSequenceClassification(config).save_pretrained(f"{folder}/reward")
tokenizer.save_pretrained(f"{folder}/reward")

trainer = GRPOTrainer(
    model,
    reward_funcs=f"{folder}/reward",
    args=GRPOConfig(
        output_dir=f"{folder}/out", max_steps=2, per_device_train_batch_size=2, num_generations=2, logging_steps=1,
        max_completion_length=6, save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": ["The capital of France", "One and one", "Water is", "A tree has"]}),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
history = trainer.state.log_history
print(json.dumps({
    "losses": [entry["loss"] for entry in history if "loss" in entry],
    "rewards": [entry["reward"] for entry in history if "reward" in entry],
    "devices": sorted({str(weight.device) for weight in trainer.model.parameters()}),
}))  # fmt: skip
