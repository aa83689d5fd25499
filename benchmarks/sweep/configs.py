"""Tiny configurations of any model class, derived from the class's own default by the names of its fields.

Sizes are small enough for a laptop and deep enough for four devices to have something to split. Only fields that the
default configuration has are set, and only where the tiny value differs, so what a class derives from its sizes (the
types of its layers, the width of a head) is derived anew.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from .overrides import overrides_of

LAYERS = 6
HIDDEN = 64
HEADS = 4
VOCABULARY = 320
SPECIAL_IDS = 256  # ids from here on stand for pictures, sounds and the like, those below 8 for padding, start and end

# Field names, as regular expressions that have to match in full, with the tiny value. The first that matches counts.
FIXED: tuple[tuple[str, Any], ...] = (
    (r".*(drop_?out|drop_?path|layer_?drop|_pdrop|drop_rate|drop_prob|jitter|classifier_drop|label_smoothing)\w*", 0.0),
    (r"(mask_time_prob|mask_feature_prob|apply_spec_augment|router_jitter_noise|input_jitter_noise)", 0.0),
    (r"(text_)?(vocab_size|src_vocab_size|tgt_vocab_size|vocab_size_per_layer_input)", VOCABULARY),
    (r"(decoder|encoder|text|codec|audio|speech|entity|pronunciation|shape)_vocab_size", VOCABULARY),
    (
        r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|"
        r"depth|layers|num_blocks|num_transformer_layers|encoder_num_layers|decoder_num_layers|"
        r"encoder_depth|decoder_depth|decoder_num_hidden_layers|encoder_num_hidden_layers)",
        LAYERS,
    ),
    (r"num_hidden_groups", LAYERS),
    (
        r"(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|attention_heads|"
        r"decoder_num_attention_heads|encoder_num_attention_heads|cross_attention_heads|num_query_heads|heads|"
        r"decoder_num_heads|num_self_attention_heads)",
        HEADS,
    ),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads?|encoder_num_key_value_heads|decoder_num_key_value_heads)", 2),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|dim|out_hidden_size|projection_dim|emb_dim|encoder_hidden_size|decoder_hidden_size|hidden_dim|width|"
        r"model_dim|embedding_size|encoder_embed_dim|decoder_embed_dim|text_hidden_size|vision_hidden_size)",
        HIDDEN,
    ),
    (
        r"(intermediate_size|ffn_dim|d_ff|encoder_ffn_dim|decoder_ffn_dim|n_inner|d_inner|dff|mlp_dim|ffn_hidden_size|"
        r"inner_dim|dim_feedforward|decoder_intermediate_size|encoder_intermediate_size|feed_forward_size|"
        r"encoder_feedforward_dim|decoder_feedforward_dim|feedforward_dim|mlp_hidden_size|fc_hidden_size)",
        2 * HIDDEN,
    ),
    (r"(moe|shared_expert|expert)_?\w*(intermediate_size|ffn_dim|ffn_hidden_size)", HIDDEN),
    (r"(head_dim|d_kv|attention_head_dim|attention_head_size|kv_channels|global_head_dim|d_head)", HIDDEN // HEADS),
    (r"(q_lora_rank|kv_lora_rank|\w*_lora_rank|\w*lora_rank)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim)", HIDDEN // HEADS),
    (r"qk_head_dim", HIDDEN // HEADS * 2),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_top_k|experts_per_token|moe_topk|moe_k)", 2),
    (r"(n_group|topk_group|num_expert_groups)", 1),
    (r"(n_shared_experts|num_shared_experts)", 1),
    (r"num_labels", 3),
    (r"(num_queries)", 12),
    (r"(num_mel_bins|feature_size|input_feat_per_channel|num_mel_features|feature_projection_input_dim)", 16),
    (r"(max_source_positions)", 64),
    (r"(max_position_embeddings|n_positions|max_target_positions|seq_length|n_ctx)", 512),
)
# Fields that a class needs and leaves empty.
MISSING = {"head_dim": HIDDEN // HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "n_routed_experts": 4}
# Fields that are lists, one entry a stage, with the tiny value of each entry.
STAGES = (
    (r"(depths|num_blocks|layer_depths|stage_depths|stage_layers)", lambda place: 2),
    (
        r"(hidden_sizes|embed_dims?|channels|num_channels_list|encoder_hidden_sizes)",
        lambda place: 16 * 2 ** min(place, 2),
    ),
    (r"(num_heads|num_attention_heads|encoder_attention_heads)", lambda place: 2),
)


def tiny(config_class: Any) -> Any:
    """Return a tiny configuration of `config_class`."""
    fields = {**_shrunk(config_class()), **overrides_of(config_class.model_type)}
    try:
        return config_class(**fields)
    except (TypeError, AttributeError):  # 4.x wants its parts as dictionaries
        return config_class(**{name: value.to_dict() if _is_config(value) else value for name, value in fields.items()})


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")


def _tiny_part(part: Any) -> Any:
    """Return the tiny form of a configuration inside another, which may have set fields of it (a backbone's stages)."""
    config_class = type(part)
    default, accepted = vars(config_class()), _fields(config_class) or set(vars(part))
    set_by_owner = {
        name: value
        for name, value in vars(part).items()
        if _is_choice(name, value) and name in accepted and name in default and value != default[name]
    }
    stages = getattr(part, "out_features", None)  # a property, and not among the fields
    if stages and stages != getattr(config_class(), "out_features", None):
        set_by_owner["out_features"] = list(stages)
        set_by_owner.pop("out_indices", None)
    shrunk = _shrunk(part)
    # A size that is small already, of a class whose own default is larger: one head of keys (PaliGemma).
    small = {
        name: value
        for name, value in vars(part).items()
        if name in accepted and name not in shrunk
        if type(value) is int and type(default.get(name)) is int and value < default[name]
    }
    try:
        return config_class(**{**set_by_owner, **small, **shrunk, **overrides_of(config_class.model_type)})
    except Exception:  # a field that goes with sizes that are no longer there
        return tiny(config_class)


def _is_choice(name: str, value: Any) -> bool:
    """Whether a field chooses between forms of a model. Sizes are shrunk, whoever has set them."""
    if name.startswith("_"):
        return False
    is_list_of_strings = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, bool | str) or is_list_of_strings or name == "out_indices"


def _shrunk(default: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    accepted = _fields(type(default))
    aliases = {alias: name for name, alias in (getattr(default, "attribute_map", None) or {}).items()}
    for name, value in vars(default).items():
        if name.startswith("_") or (accepted is not None and name not in accepted and name not in aliases):
            continue
        if _is_config(value):
            values[name] = _tiny_part(value)
            continue
        small = _small(name, value)
        if small is not None and small != value:
            values[name] = small
    _agree(values, default)
    return values


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a field that differs from layer to layer
        return None


def _fields(config_class: Any) -> set[str] | None:
    """Return the names that the class declares; None where they cannot be told."""
    names: set[str] = set()
    for base in config_class.__mro__:
        names |= set(vars(base).get("__annotations__", ()))
        init = vars(base).get("__init__")
        if init is not None:
            names |= set(inspect.signature(init).parameters)
    return names or None


def _small(name: str, value: Any) -> Any:
    """Return the tiny value of field `name`, None where it stays as it is."""
    if value is None:
        return MISSING.get(name)
    if isinstance(value, bool):
        return False if name == "apply_spec_augment" else None
    for pattern, small in FIXED:
        if re.fullmatch(pattern, name) and isinstance(value, int | float):
            return type(value)(small) if isinstance(value, float) else small if value > small else None
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        return _small_list(name, list(value))
    return None


def _small_list(name: str, value: list[int]) -> list[int] | None:
    for pattern, small in STAGES:
        if re.fullmatch(pattern, name):
            return [min(size, small(place)) for place, size in enumerate(value)]
    return None


def _agree(values: dict[str, Any], default: Any) -> None:
    """Make ids fit the vocabulary, rotary sections the width of a head, and pictures the patches."""
    next_id = SPECIAL_IDS
    if "pad_token_id" in vars(default) and default.pad_token_id is None:
        values["pad_token_id"] = 0  # classifiers of sequences look for the last token before it
    for name, value in vars(default).items():
        if isinstance(value, int) and not isinstance(value, bool) and re.search(r"token_id(x)?$|_token_index$", name):
            if value >= SPECIAL_IDS:
                values[name] = next_id
                next_id += 1
        elif name.endswith("token_id") and isinstance(value, list) and any(item >= SPECIAL_IDS for item in value):
            values[name] = [2]
    if "mrope_section" in (getattr(type(default), "ignore_keys_at_rope_validation", None) or ()):
        rope = dict(getattr(default, "rope_parameters", None) or {})
        width = (values.get("head_dim") or HIDDEN // HEADS) * rope.get("partial_rotary_factor", 1.0)
        third = max(1, int(width) // 2 * 3 // 8)
        usual = {"rope_type": "default", "rope_theta": 10000.0}
        values["rope_parameters"] = {**usual, **rope, "mrope_section": [int(width) // 2 - 2 * third, third, third]}
    if _value(default, "kv_lora_rank") is not None and "num_key_value_heads" in vars(default):
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
    if getattr(default, "window_size", None) is not None:
        return  # pictures have to be a number of windows wide
    image, patch = getattr(default, "image_size", None), getattr(default, "patch_size", None)
    if isinstance(patch, list | tuple) and isinstance(image, list | tuple) and image[0] > 8 * patch[0]:
        values["image_size"] = [4 * length for length in patch]
    elif isinstance(image, int) and isinstance(patch, int) and image > 8 * patch:
        values["image_size"] = 4 * patch


__all__ = ["HEADS", "HIDDEN", "LAYERS", "SPECIAL_IDS", "VOCABULARY", "tiny"]
