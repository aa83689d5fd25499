"""Trainings whose predicted peaks are compared with simulated ones: models, maps and workloads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from balance_shim.versions import version_of

# Large enough that the rounding of small tensors and what the Trainer itself keeps do not show.
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 16384}
SMALL = {**TEXT, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2048}


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**TEXT, **changes})


def tied() -> Any:
    return transformers.Qwen2Config(**{**TEXT, "tie_word_embeddings": True, "vocab_size": 32768})


def gemma() -> Any:
    return transformers.Gemma2Config(**TEXT, head_dim=64, sliding_window=256)


def gpt2() -> Any:
    return transformers.GPT2Config(n_embd=512, n_layer=8, n_head=8, vocab_size=16384)


def mixtral() -> Any:
    return transformers.MixtralConfig(**TEXT, num_local_experts=4, max_position_embeddings=2048)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=512, d_ff=1024, num_layers=4, num_heads=8, vocab_size=16384, decoder_start_token_id=0
    )
    config.architectures = ["T5ForConditionalGeneration"]
    return config


def neox() -> Any:
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=2048)
    config.architectures = ["GPTNeoXForCausalLM"]
    return config


def stablelm() -> Any:
    config = transformers.StableLmConfig(**TEXT)
    config.architectures = ["StableLmForCausalLM"]
    return config


def phi() -> Any:
    config = transformers.PhiConfig(**TEXT)
    config.architectures = ["PhiForCausalLM"]
    return config


def opt() -> Any:
    config = transformers.OPTConfig(**SIZES, ffn_dim=2048, word_embed_proj_dim=512)
    config.architectures = ["OPTForCausalLM"]
    return config


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=16384
    )
    config.architectures = ["BertForSequenceClassification"]
    return config


def qwen_vl() -> Any:
    vision = {
        "hidden_size": 320, "out_hidden_size": 512, "depth": 6, "num_heads": 4, "intermediate_size": 860,
        "fullatt_block_indexes": [2, 5],
    }  # fmt: skip
    rope = {"type": "mrope", "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2_5_VLConfig(**TEXT, rope_scaling=rope, vision_config=vision)
    config.image_token_id, config.vision_start_token_id, config.video_token_id = 100, 101, 102
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        config: makes the model's config.
        devices: how many devices it is spread over.
        head: the index of the device that the head is on, -1 for the last one; 0 is where 4.x has to have it.
        dtype: of the weights.
        prepare: "", "lora", "frozen", "frozen embedding" or "head only".
        rows: "text", "classes", "translation", "pictures" or "ragged".
        tokens: in a row.
        arguments: of `TrainingArguments`.
        repeats: whether keys and values of grouped queries are repeated where that saves memory, as for models that
            the shim has placed.
        metrics: "" for a training without evaluation, "none" for one of the loss alone, "logits" for metrics of all
            logits, "classes" for metrics of what `preprocess_logits_for_metrics` makes of them.
        tolerance: the largest relative error of a device's predicted peak.
    """

    config: Callable[[], Any] = llama
    devices: int = 4
    head: int = -1
    dtype: torch.dtype = torch.bfloat16
    prepare: str = ""
    examples: str = "text"
    tokens: int = 1024
    arguments: dict[str, Any] = field(default_factory=dict)
    repeats: bool = False
    metrics: str = ""
    tolerance: float = 0.03


_FUSED = {"optim": "adamw_torch_fused"}
_EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
_FOREACH = {"optim": "adamw_torch"}
_CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

CASES = {
    "full": Case(arguments=_FUSED),
    "full-foreach": Case(arguments=_FOREACH),
    "full-float32": Case(dtype=torch.float32, arguments=_FUSED),
    "full-two-devices": Case(devices=2, arguments=_FUSED),
    "full-one-device": Case(devices=1, arguments=_FUSED),
    "full-head-on-first": Case(head=0, arguments=_FUSED),
    "full-short-rows": Case(tokens=64, arguments=_FOREACH),
    "full-many-rows": Case(tokens=128, arguments={**_FUSED, "per_device_train_batch_size": 16}),
    "ragged": Case(examples="ragged", arguments=_FUSED),
    "eager-attention": Case(lambda: llama(attn_implementation="eager"), arguments=_FUSED, tokens=512),
    "sgd": Case(arguments={"optim": "sgd"}),
    # On several devices its step counts end up on the first one, by accelerate, and torch refuses them.
    "adagrad": Case(devices=1, arguments={"optim": "adagrad"}),
    "rmsprop": Case(arguments={"optim": "rmsprop"}),
    "adafactor": Case(arguments={"optim": "adafactor"}, tokens=64),
    "checkpointing": Case(arguments={**_FUSED, **_CHECKPOINTING}),
    "checkpointing-reentrant": Case(arguments={**_FUSED, **_REENTRANT}),
    "accumulation": Case(arguments={**_FUSED, "gradient_accumulation_steps": 2}),
    "accumulation-checkpointing-foreach": Case(
        arguments={**_FOREACH, **_CHECKPOINTING, "gradient_accumulation_steps": 2}
    ),
    "autocast": Case(dtype=torch.float32, arguments={**_FUSED, "bf16": True}),
    "autocast-checkpointing": Case(dtype=torch.float32, arguments={**_FUSED, **_CHECKPOINTING, "bf16": True}),
    "autocast-accumulation": Case(
        dtype=torch.float32, arguments={**_FUSED, "bf16": True, "gradient_accumulation_steps": 2}
    ),
    "autocast-half-weights": Case(arguments={**_FUSED, "bf16": True}),
    # Under CUDA's autocast LayerNorm runs in float32.
    "neox-autocast-half-weights": Case(neox, arguments={**_FUSED, "bf16": True}),
    "stablelm-autocast-half-weights": Case(stablelm, arguments={**_FUSED, "bf16": True}),
    "phi-autocast-half-weights": Case(phi, arguments={**_FUSED, "bf16": True}),
    "opt-autocast-half-weights": Case(opt, head=0, arguments={**_FUSED, "bf16": True}),
    "phi-autocast-checkpointing": Case(phi, arguments={**_FUSED, **_CHECKPOINTING, "bf16": True}),
    "fp16": Case(dtype=torch.float32, arguments={**_FUSED, "fp16": True}),
    # No fused kernel takes grouped queries in float32: S x S probabilities are kept, unless keys are repeated.
    "grouped-float32": Case(dtype=torch.float32, arguments=_FUSED),
    "grouped-float32-checkpointing": Case(dtype=torch.float32, arguments={**_FUSED, **_CHECKPOINTING}),
    "grouped-float32-lora": Case(dtype=torch.float32, prepare="lora", arguments=_FUSED),
    "grouped-float32-repeated": Case(dtype=torch.float32, repeats=True, arguments=_FUSED),
    "float32-padded": Case(dtype=torch.float32, examples="ragged", arguments=_FUSED),
    "label-smoothing": Case(arguments={**_FUSED, "label_smoothing_factor": 0.1}),
    "evaluation": Case(tokens=256, arguments={**_FUSED, **_EVALUATION}, metrics="none"),
    "evaluation-logits": Case(tokens=256, arguments={**_FUSED, **_EVALUATION}, metrics="logits"),
    "evaluation-logits-moved": Case(
        tokens=256, arguments={**_FUSED, **_EVALUATION, "eval_accumulation_steps": 2}, metrics="logits"
    ),
    "evaluation-classes": Case(tokens=256, arguments={**_FUSED, **_EVALUATION}, metrics="classes"),
    "evaluation-autocast": Case(
        tokens=256, dtype=torch.float32, arguments={**_FUSED, **_EVALUATION, "bf16": True}, metrics="logits"
    ),
    "evaluation-lora": Case(tokens=256, prepare="lora", arguments={**_FUSED, **_EVALUATION}, metrics="none"),
    "lora": Case(prepare="lora", arguments=_FUSED),
    "lora-checkpointing": Case(prepare="lora", arguments={**_FUSED, **_CHECKPOINTING}),
    "lora-autocast": Case(prepare="lora", arguments={**_FUSED, "bf16": True}),
    "head-only": Case(prepare="head only", arguments=_FUSED),
    "frozen-embedding": Case(prepare="frozen embedding", arguments=_FUSED),
    "tied": Case(tied, head=0, arguments=_FUSED),
    "tied-accumulation": Case(tied, head=0, arguments={**_FOREACH, "gradient_accumulation_steps": 2}),
    "sliding-windows": Case(gemma, head=0, arguments=_FUSED),
    "gpt2": Case(gpt2, head=0, arguments=_FUSED),
    "mixtral": Case(mixtral, arguments=_FUSED),
    "mixtral-lora": Case(mixtral, prepare="lora", arguments=_FUSED),
    "mixtral-checkpointing": Case(mixtral, arguments={**_FUSED, **_CHECKPOINTING}),
    "t5": Case(t5, head=0, examples="translation", tokens=512, arguments=_FUSED),
    "t5-autocast": Case(
        t5, head=0, examples="translation", tokens=512, dtype=torch.float32, arguments={**_FUSED, "bf16": True}
    ),
    "bert-classifier": Case(bert, head=0, examples="classes", tokens=512, arguments=_FUSED),
    "bert-classifier-autocast": Case(
        bert, head=0, examples="classes", tokens=512, dtype=torch.float32, arguments={**_FUSED, "bf16": True}
    ),
    "qwen-vl": Case(qwen_vl, examples="pictures", arguments=_FUSED),
    "qwen-vl-frozen": Case(qwen_vl, prepare="frozen", examples="pictures", arguments=_FUSED),
    "qwen-vl-checkpointing": Case(qwen_vl, examples="pictures", arguments={**_FUSED, **_CHECKPOINTING}),
    "qwen-vl-lora": Case(qwen_vl, prepare="lora", examples="pictures", arguments=_FUSED),
}
if version_of("transformers") < (5, 0):
    for name, case in CASES.items():
        if case.examples == "text":  # the heads of 4.x fail on any device but the first one
            CASES[name] = replace(case, head=0)
    # Its Trainer leaves the cache on, which fills up in the forward pass: what frozen layers put there is counted for
    # one layer at a time, and a decoder's keys and values of the encoder's states are copied to each device once.
    # Under autocast the cache has keys in another type than attention keeps; without it these agree within 1 %, too.
    for name in ("head-only", "t5", "t5-autocast", "neox-autocast-half-weights", "opt-autocast-half-weights"):
        CASES[name] = replace(CASES[name], tolerance=0.06)

# With numbers, and therefore small.
REAL_CASES = {
    "full": Case(lambda: llama(**SMALL), tokens=256, arguments=_FOREACH),
    "lora": Case(lambda: llama(**SMALL), tokens=256, prepare="lora", arguments=_FUSED),
    "checkpointing": Case(lambda: llama(**SMALL), tokens=256, arguments={**_FUSED, **_CHECKPOINTING}),
    "grouped-float32": Case(lambda: llama(**SMALL), tokens=256, dtype=torch.float32, arguments=_FUSED),
}


def device_map(blocks: Sequence[Any], case: Case) -> dict[str, int]:
    """Return a map that spreads the layers of a model over the devices, uneven on purpose."""
    layers = [block.name for block in blocks if block.role == "layer"]
    places = {}
    before_layers = True
    last = case.devices - 1
    for block in blocks:
        if block.role == "layer":
            before_layers = False
            # The first device gets fewer.
            share = (layers.index(block.name) + 1) / (len(layers) + 1)
            places[block.name] = min(last, int(share * case.devices))
        else:
            ahead = before_layers or block.role == "tower" or "embed_tokens" in block.name
            places[block.name] = 0 if ahead else case.head % case.devices
    return places
