"""Pictures: alone, in tiles, as patches with a grid, or in the layouts of single families."""

from typing import Any

import torch

from .wants import Batch, Wants, first_of, pair, whole_numbers

IMAGE_TOKENS = 1024  # of the pictures that a vision-language model is supposed to get, at most half of a sequence
CHANNELS = ("in_channels", "in_chans", "num_channels")
ANY_SIZE = ("pixtral",)  # vision towers that take sizes; LLaVA's `forward` takes them for those only
FEATURELESS = 224  # pixels a side where no config has a size


def pictures(wants: Wants) -> Batch:
    """Return a picture for each row; nothing for models that take none, or where the sizes are unknown."""
    if "pixel_values" not in wants.accepted:
        return {}
    vision = vision_config(wants)
    if "aspect_ratio_ids" in wants.accepted:
        return _in_tiles_of_aspect_ratios(wants, vision)
    if "image_grid_thw" in wants.accepted:
        return _as_patches(wants, vision)
    size = first_of(vision, "image_size", default=first_of(wants.config, "image_size"))
    if "image_sizes" in wants.accepted and hasattr(wants.config, "image_grid_pinpoints"):
        return _in_best_resolution(wants, vision)
    if "image_sizes" in wants.accepted and getattr(vision, "model_type", "") in ANY_SIZE:
        return _of_any_size(wants, vision)
    if size is None and hasattr(vision, "backbone_config"):
        size = first_of(vision.backbone_config, "image_size")
    height, width = pair(FEATURELESS if size is None else size)
    channels = first_of(vision, *CHANNELS, default=3)
    if "pixel_attention_mask" in wants.accepted:  # Idefics 2 and 3, SmolVLM: some pictures for each row
        pixels = torch.full((wants.rows, 1, channels, height, width), 0.5)  # zeros would be taken for padding
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(wants.rows, 1, height, width).bool()}
    frames = first_of(vision, "num_frames") if "Video" in wants.kind else None
    if isinstance(frames, int):
        return {"pixel_values": torch.zeros(wants.rows, frames, channels, height, width)}
    return {"pixel_values": torch.zeros(wants.rows, channels, height, width)}


def vision_config(wants: Wants) -> Any:
    """Return the config of the part that sees: the vision tower's or the encoder's, else the model's own."""
    return first_of(wants.config, "vision_config", "encoder", "vision_tower_config", "vit_config", default=wants.config)


def _as_patches(wants: Wants, vision: Any) -> Batch:
    """Return the pictures of Qwen2-VL and its like: all patches in one row, with a grid for each picture."""
    merge, patch = getattr(vision, "spatial_merge_size", 1), pair(vision.patch_size)[0]
    side = merge * max(1, int(max(1, min(IMAGE_TOKENS, wants.tokens // 2)) ** 0.5))
    width = first_of(vision, *CHANNELS, default=3) * getattr(vision, "temporal_patch_size", 1) * patch**2
    grid = torch.tensor([[1, side, side]] * wants.rows)
    return {"pixel_values": torch.zeros(wants.rows * side * side, width), "image_grid_thw": grid}


def _in_best_resolution(wants: Wants, vision: Any) -> Batch:
    """Return the pictures of LLaVA-NeXT and its like: a small whole one, and the tiles of a large one."""
    height, width = pair(vision.image_size)
    pinpoints = [pair(pinpoint) for pinpoint in wants.config.image_grid_pinpoints]
    tall, wide = min(pinpoints, key=lambda size: size[0] * size[1])
    tiles = 1 + (tall // height) * (wide // width)
    pixels = torch.zeros(wants.rows, tiles, first_of(vision, *CHANNELS, default=3), height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[tall, wide]] * wants.rows)}


def _of_any_size(wants: Wants, vision: Any) -> Batch:
    """Return the pictures of Pixtral and its like, which come in any size up to the largest."""
    patch = pair(vision.patch_size)[0]
    merge = first_of(wants.config, "spatial_merge_size", default=1)
    most = max(1, int(min(IMAGE_TOKENS, wants.tokens // 2) ** 0.5))
    side = patch * merge * min(most, max(1, pair(vision.image_size)[0] // (patch * merge)))
    pixels = torch.zeros(wants.rows, first_of(vision, *CHANNELS, default=3), side, side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * wants.rows)}


def _in_tiles_of_aspect_ratios(wants: Wants, vision: Any) -> Batch:
    """Return the pictures of Llama 3.2 Vision: tiles, of which a row's tokens see those of its own picture."""
    tiles = vision.max_num_tiles
    height, width = pair(vision.image_size)
    return {
        "pixel_values": torch.zeros(wants.rows, 1, tiles, vision.num_channels, height, width),
        "aspect_ratio_ids": whole_numbers(wants.rows, 1, value=1),
        "aspect_ratio_mask": whole_numbers(wants.rows, 1, tiles, value=1),
        "cross_attention_mask": whole_numbers(wants.rows, wants.tokens, 1, tiles, value=1),
    }
