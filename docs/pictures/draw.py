"""Draw the pictures of the documentation: `python docs/pictures/draw.py`. Needs PEFT, and neither weights nor a GPU."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["BALANCE_MODE"] = "off"  # importing the package must patch nothing here

from balance_shim.cli.main import main

# huggingface.co/Qwen/Qwen2.5-7B, config.json
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 131072, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 152064,
}  # fmt: skip
# Transformers' map runs out of memory with this workload, and the balanced one does not.
WORKLOAD = ("--gpus", "4xRTX4090", "--tuning", "lora", "--batch-size", "2", "--seq-len", "3072")


def draw(folder: Path) -> int:
    """Write `before-and-after.svg` into `folder`; return the exit code of `balance-shim plan`."""
    with tempfile.TemporaryDirectory() as model:
        Path(model, "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
        return main(["plan", model, *WORKLOAD, "--picture", str(folder / "before-and-after.svg")])


if __name__ == "__main__":
    sys.exit(draw(Path(__file__).parent))
