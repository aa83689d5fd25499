"""Two steps of full fine-tuning of Qwen2.5-7B on four devices of 80 GiB, with shapes only: `big_model.py FOLDER`."""

import json
import sys
import time

import torch

from balance_shim import simulation
from balance_shim.units import GIB

simulation.install(simulation.parse_spec("4x80GiB:shapes"))

import transformers  # noqa: E402 - as in a script, where the simulation is there before anything else
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

from tests.simulation.child import most_resident  # noqa: E402
from tests.simulation.sparse_checkpoint import write_sparse_checkpoint  # noqa: E402

CONFIG = transformers.Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip

# What transformers 5.23 makes of "auto"; 4.51 makes another map, and fails when the head is not on the first device.
MAP = {"model.embed_tokens": 0, "model.rotary_emb": 2, "model.norm": 2, "lm_head": 3}
MAP |= {f"model.layers.{number}": 0 if number < 6 else 1 if number < 17 else 2 for number in range(28)}


def main(folder: str) -> None:
    write_sparse_checkpoint(CONFIG, folder)
    start = time.process_time()
    dtype = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=MAP, **{dtype: torch.bfloat16})
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 500, (2, 2048))]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        optim="adamw_torch_fused",
    )
    Trainer(model=model, args=arguments, train_dataset=examples).train()
    results = {
        "peaks": [device.peak / GIB for device in simulation.usage()],
        "resident": most_resident() / GIB,
        "seconds": time.process_time() - start,
    }
    print(json.dumps(results))


main(sys.argv[1])
