"""PEFT's methods on a causal model: trained by the Trainer, saved, and merged where the method can be."""

import sys

import peft
import torch
from common import MODELS, NAME, OUTPUT, arguments, token_rows, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "modules_to_save": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "trainable_tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [5, 6, 7]}),
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "p_tuning": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=32),
    "prefix": lambda: peft.PrefixTuningConfig(**PROMPT),
    "packed_experts": lambda: peft.LoraConfig(
        r=4,
        lora_dropout=0.0,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
}
MERGED = ("lora", "dora")

torch.manual_seed(0)
base = "experts" if NAME == "packed_experts" else "llama"
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODELS / base, device_map="auto"), CONFIGS[NAME]())
loop = Trainer(model, arguments(TrainingArguments), train_dataset=token_rows())
train(loop, kind="PEFT", base=base)
if NAME in MERGED and loop.args.world_size == 1:
    model.merge_and_unload().save_pretrained(OUTPUT / "merged")
    AutoModelForCausalLM.from_pretrained(OUTPUT / "merged")
sys.stdout.flush()
