"""What generic shrinking cannot know: fields of single configurations, by model type."""

from __future__ import annotations

from typing import Any


def _resnet(*stages: str) -> dict[str, Any]:
    """Return a backbone in place of those of timm, which is not installed."""
    backbone = {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [2, 2, 2, 2],
        "layer_type": "basic", "out_features": list(stages),
    }  # fmt: skip
    return {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "backbone_config": backbone}


def _pinpoints(size: int) -> dict[str, Any]:
    """Return the resolutions that pictures are cut to, for tiles of `size` pixels."""
    return {"image_grid_pinpoints": [[2 * size, size], [size, 2 * size], [2 * size, 2 * size]]}


ONE_STAGE, THREE_STAGES = _resnet("stage4"), _resnet("stage2", "stage3", "stage4")
FOUR_STAGES = _resnet("stage1", "stage2", "stage3", "stage4")
DINO = {
    "model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14, "out_indices": [2, 3, 4, 6], "reshape_hidden_states": False, "apply_layernorm": True,
}  # fmt: skip
WITHOUT_PICTURES = {"vocabulary_map": {"<image>": 256}}  # codes of pictures would take a row of the vocabulary each
EQUAL_HEADS = {"num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "hiera": {"image_size": [224, 224]},
    "blenderbot": {"encoder_layers": 6},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 4]},
    "lilt": {"hidden_size": 96},
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "audio-spectrogram-transformer": {"max_length": 64},
    "beit": {"out_indices": [1, 2, 3, 5], "image_size": 224},
    "bit": {"num_groups": 8},
    "chameleon": WITHOUT_PICTURES,
    "emu3": WITHOUT_PICTURES,
    "blip-2": {"image_token_index": 256, "num_query_tokens": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "conditional_detr": ONE_STAGE,
    "dab-detr": ONE_STAGE,
    "deformable_detr": THREE_STAGES,
    "depth_anything": {"backbone_config": DINO, "reassemble_hidden_size": 64},
    "detr": {**FOUR_STAGES, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "dpt": {"backbone_out_indices": [1, 2, 4, 5], "neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16},
    "dots3_note": EQUAL_HEADS,
    "dots3_note_text": EQUAL_HEADS,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
    "esmc": EQUAL_HEADS,
    "gemma3": {"mm_tokens_per_image": 4},
    "glm5_next": EQUAL_HEADS,
    "glm5_next_text": EQUAL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "instructblip": {"image_token_index": 256, "num_query_tokens": 8},
    "instructblipvideo": {"video_token_index": 256, "num_query_tokens": 8},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16], "stage_in_channels": [16, 32, 32, 64], "stage_mid_channels": [16] * 4,
        "stage_out_channels": [32, 32, 64, 64], "stage_num_blocks": [1, 1, 2, 1], "stage_numb_of_layers": [3] * 4,
        "hidden_sizes": [32, 32, 64, 64], "embedding_size": 16,
    },
    "idefics3_vision": {"image_size": 64, "patch_size": 16},
    "kosmos-2": {"latent_query_num": 8},
    "llava_next": _pinpoints(224),
    "llava_next_video": _pinpoints(224),
    "llava_onevision": _pinpoints(64),
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 64, "image_size": 64},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "mllama_vision_model": {
        "intermediate_layers_indices": [1, 3], "num_global_layers": 2, "vision_output_dim": 192, "image_size": 56,
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4, "pad_token_id": 0},
    "oneformer": {"num_queries": 24},
    "perceiver": {
        "d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 6, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1, "max_position_embeddings": 128, "d_model": 64,
    },
    "prompt_depth_anything": {"backbone_config": DINO, "reassemble_hidden_size": 64},
    "reformer": {
        "hash_seed": 0, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 16], "is_decoder": True,
        "num_hashes": 1,
        "attn_layers": ["local", "lsh"] * 3, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4,
    },
    "smolvlm_vision": {"image_size": 64, "patch_size": 16},
    "table-transformer": ONE_STAGE,
    "tipsv2_dpt": {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16},
    "upernet": {**FOUR_STAGES, "auxiliary_in_channels": 32, "hidden_size": 32},
}  # fmt: skip


def overrides_of(model_type: str) -> dict[str, Any]:
    """Return the fields to set in the configuration of `model_type`."""
    return OVERRIDES.get(model_type, {})
