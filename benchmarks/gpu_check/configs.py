"""The models of the check: published widths, with as few layers as show what one card is to show."""

from __future__ import annotations

from typing import Any

QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip

# name -> (configuration class, its sizes)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-0.5B": ("Qwen2Config", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }),
    "Llama-3.2-1B, 8 layers": ("LlamaConfig", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
    "Qwen2.5-7B, 2 layers": ("Qwen2Config", {**QWEN_7B, "num_hidden_layers": 2}),
    "Mistral-7B, 4 layers": ("MistralConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None,
    }),
    # Norms with nn.LayerNorm, which CUDA's autocast computes in float32.
    "StableLM-2-1.6B, 8 layers": ("StableLmConfig", {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 100352,
    }),
    "Pythia-1.4B, 8 layers": ("GPTNeoXConfig", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16,
        "vocab_size": 50304,
    }),
    "Qwen2.5-7B": ("Qwen2Config", {**QWEN_7B, "num_hidden_layers": 28}),
    "Llama-3-8B": ("LlamaConfig", {**LLAMA_8B, "num_hidden_layers": 32}),
    # For a quick look at whether the check works.
    "tiny": ("LlamaConfig", {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def config_of(name: str) -> Any:
    import transformers

    config_class, sizes = MODELS[name]
    return getattr(transformers, config_class)(**sizes)


def build(name: str, dtype: Any, device: Any) -> Any:
    """Return the model `name` with random weights of torch type `dtype` on `device`."""
    import torch
    from transformers import AutoModelForCausalLM

    from balance_shim.versions import version_of

    keyword = "dtype" if version_of("transformers") >= (4, 56) else "torch_dtype"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(name), **{keyword: dtype})
