"""Train a small mixture of experts on rows so short that a row does not need every expert.

python experts.py --output FOLDER --losses FILE [--batch-size 2]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--output", required=True)
parser.add_argument("--losses", required=True)
parser.add_argument("--batch-size", type=int, default=1)
options = parser.parse_args()

set_seed(42)
config = DeepseekV3Config(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, first_k_dense_replace=1,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
    vocab_size=512, max_position_embeddings=64,
)  # fmt: skip
model = DeepseekV3ForCausalLM(config)
arguments = TrainingArguments(
    output_dir=options.output, max_steps=4, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
)  # fmt: skip
sequences = [torch.randint(512, (10,), generator=torch.Generator().manual_seed(index)) for index in range(8)]


class Counting(Trainer):
    """Counts how many experts this process has left out, in versions that have them in a list."""

    left_out = 0

    def compute_loss(self, model, *args, **kwargs):
        expert_modules = [getattr(module, "experts", None) for module in model.modules()]
        lists = [experts for experts in expert_modules if isinstance(experts, torch.nn.ModuleList)]
        used = set()
        hooks = [
            expert.register_forward_hook(lambda module, *_: used.add(module)) for experts in lists for expert in experts
        ]
        loss = super().compute_loss(model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        self.left_out += len(hooks) - len(used)
        return loss


trainer = Counting(
    model=model, args=arguments, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in sequences]
)
trainer.train()
if arguments.process_index == 0:
    logged = [*trainer.state.log_history, {"experts_left_out": trainer.left_out}]
    Path(options.losses).write_text("".join(json.dumps(entry) + "\n" for entry in logged))
