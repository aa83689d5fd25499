"""What to feed a model with while it is traced: a real batch where there is one, else one that its config suggests."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from balance_shim.virtual.machine import Machine

from ..workload import Workload
from .copy import CannotTrace
from .machine import traced

MOST_TOKENS = 1 << 24  # in a batch; they have numbers, and more than this many would fill the host's own memory
IMAGE_TOKENS = 1024  # of the picture that a vision-language model is supposed to get, at most half of a row


def on_first_device(batch: Mapping[str, Any], model: nn.Module, machine: Machine) -> dict[str, Any]:
    """Return what `model` takes of `batch`, with traced tensors, on the device where inputs arrive."""
    accepted = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    return {
        name: traced(each, 0, machine) if isinstance(each, torch.Tensor) else each
        for name, each in batch.items()
        if anything or name in accepted
    }


def supposed_batch(model: nn.Module, workload: Workload) -> dict[str, torch.Tensor]:
    """Return a batch of plain tensors for `model`.

    Raises:
        CannotTrace: nothing is known about what this model takes, or it is more than this machine could hold.
    """
    accepted = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    rows, tokens = workload.batch_size, workload.seq_len
    if "input_ids" not in accepted or "labels" not in accepted:
        raise CannotTrace(f"{type(model).__name__} takes no input_ids and labels")
    if workload.tokens > MOST_TOKENS:
        raise CannotTrace(f"{rows} x {tokens} tokens are more than can be tried out")
    ids = torch.ones((rows, tokens), dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch.update(_picture(model, ids, accepted))
    batch["labels"] = _labels(model, batch["input_ids"])
    return {name: each for name, each in batch.items() if name in accepted}


def supposed_pictures(model: nn.Module, tower: nn.Module, workload: Workload) -> dict[str, torch.Tensor]:
    """Return what the vision tower of `model` gets by itself: pictures for a good part of each row.

    Raises:
        CannotTrace: the tower does not say what size it takes.
    """
    vision: Any = getattr(tower, "config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size is None or patch is None:
        raise CannotTrace("what its tower takes is unknown")
    height, width = _pair(size)
    patch = _pair(patch)[0]
    shrunk = getattr(getattr(model, "config", None), "downsample_ratio", 1) ** 2  # InternVL's word for merging patches
    tokens = max(1, int(height // patch * (width // patch) * shrunk))
    pictures = workload.batch_size * max(1, min(IMAGE_TOKENS, workload.seq_len // 2) // tokens)
    return {"pixel_values": torch.zeros(pictures, getattr(vision, "num_channels", 3), height, width)}


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _labels(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    kind = type(model).__name__
    if kind.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        config: Any = model.config
        if getattr(config, "num_labels", 2) == 1:
            return torch.zeros(ids.shape[0])
        return torch.zeros(ids.shape[0], dtype=torch.int64)
    if kind.endswith("ForTokenClassification"):
        return torch.zeros_like(ids)
    return ids.clone()


def _picture(model: nn.Module, ids: torch.Tensor, accepted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the pixels of one picture a row, and mark its tokens in `ids`; nothing for models of text."""
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if vision is None or token is None or "pixel_values" not in accepted:
        return {}
    rows, tokens = ids.shape
    wanted = max(1, min(IMAGE_TOKENS, tokens // 2))
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", getattr(vision, "num_channels", 3)))
    if "image_grid_thw" in accepted:
        merge = vision.spatial_merge_size
        side = merge * max(1, int(wanted**0.5))
        used = (side // merge) ** 2
        if used > tokens:
            return {}
        ids[:, :used] = token
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * rows)
        kinds = (ids == token).to(ids.dtype)  # of each token, 1 for a picture's: 5.x asks for it
        pixels = torch.zeros(rows * side * side, width)
        return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    size = getattr(vision, "image_size", None)
    if size is None:
        return {}
    height, width = _pair(size)
    length = getattr(config, "image_seq_length", None)
    if hasattr(config, "vision_feature_select_strategy") and isinstance(vision.patch_size, int):  # the Llava family
        length = (height // vision.patch_size) * (width // vision.patch_size)
    if not isinstance(length, int) or length > tokens:
        return {}
    tiles = max(1, wanted // length)
    ids[:, : tiles * length] = token
    return {"pixel_values": torch.zeros(rows * tiles, channels, height, width)}
