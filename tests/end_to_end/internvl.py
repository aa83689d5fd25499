"""InternVL2.5-26B in miniature, for ms-swift: random weights, its module names, its rule of what is not split."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.models import MODELS, REMOTE_CODE
from tests.end_to_end import assets

TILE = 28  # pixels a side; four patches, merged into one token


def make_model(folder: Path) -> Path:
    """Write the model with its remote code and a tokenizer, and return `folder`."""
    sys.path.insert(0, str(REMOTE_CODE.parent))
    try:
        config = MODELS["InternVL2.5-26B-remote"].make_config()
    finally:
        sys.path.remove(str(REMOTE_CODE.parent))
    import torch
    from internvl_chat import InternVLChatModel  # after make_config, which imports it

    tokenizer = assets.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    shrink(config.vision_config, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
           image_size=[TILE, TILE])  # fmt: skip
    shrink(config.llm_config, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8,
           num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    torch.manual_seed(0)
    InternVLChatModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_code(folder)
    return folder


def add_code(folder: Path) -> None:
    """Put the class beside the config in `folder`, which then names it, as in the real checkpoint."""
    shutil.copy(REMOTE_CODE, folder)
    file = folder / "config.json"
    named = {"AutoConfig": "InternVLChatConfig", "AutoModel": "InternVLChatModel",
             "AutoModelForCausalLM": "InternVLChatModel"}  # fmt: skip
    written = json.loads(file.read_text(encoding="utf-8"))
    written["auto_map"] = {key: f"{REMOTE_CODE.stem}.{name}" for key, name in named.items()}
    file.write_text(json.dumps(written), encoding="utf-8")


def shrink(config: Any, **sizes: Any) -> None:
    for name, size in sizes.items():
        setattr(config, name, size)
