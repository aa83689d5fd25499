"""Placeholders: the tokens of a sequence that the features of a picture, a video or a clip are put in place of."""

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CannotTrace
from ..machine import traced, tracing
from ..model_copy import traced_copy
from .pictures import IMAGE_TOKENS
from .wants import Batch, Wants

if TYPE_CHECKING:
    from torch import nn

PICTURE = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id")
VIDEO = ("video_token_index", "video_token_id")
SOUND = ("audio_token_id", "audio_token_index")


def with_placeholders(wants: Wants, batch: Batch) -> Batch:
    """Return `batch` with as many placeholders in its tokens as its pictures and clips make features.

    How many those are the model itself shows, run on shapes: families count them in ways of their own.

    Raises:
        CannotTrace: the sequences are too short for a picture, or the number of tokens of a picture is unknown.
    """
    batch = _in_place_of(wants, batch, wants.ids(*PICTURE), "get_image_features", "pixel_values")
    if wants.ids(*PICTURE) is None:  # InstructBLIP for videos has these alone
        batch = _in_place_of(wants, batch, wants.ids(*VIDEO), "get_video_features", "pixel_values")
    batch = _in_place_of(wants, batch, wants.ids(*VIDEO), "get_video_features", "pixel_values_videos")
    return _in_place_of(wants, batch, wants.ids(*SOUND), "get_audio_features", "input_features")


def _in_place_of(wants: Wants, batch: Batch, token: int | None, method: str, main: str) -> Batch:
    ids = batch.get("input_ids")
    if token is None or main not in batch or ids is None:
        return batch
    counted = _features(wants, batch, method)
    if counted is None and main == "pixel_values":
        counted = _features_of_grid(wants, batch)
    if counted is None:
        return batch
    count, rest = divmod(counted, wants.rows)
    if rest or not count or count >= ids.shape[-1]:
        raise CannotTrace(f"{count} placeholders of {main} leave no room in {ids.shape[-1]} tokens")
    several = max(1, min(IMAGE_TOKENS, ids.shape[-1] // 2) // count) if _is_one_a_row(wants, batch, main) else 1
    batch = {**batch, main: batch[main].repeat(several, *[1] * (batch[main].dim() - 1))}
    count *= several
    ids = ids.clone()
    start = int(_is_placeholder(wants, ids[0]).sum())  # behind those of another kind
    if start + count > ids.shape[-1]:
        raise CannotTrace(f"{start + count} placeholders leave no room in {ids.shape[-1]} tokens")
    ids[:, start : start + count] = token
    kinds = {"mm_token_type_ids", "token_type_ids"} & wants.accepted if main == "pixel_values" else set()
    return {**batch, "input_ids": ids, **{name: (ids == token).to(ids.dtype) for name in kinds}}


def _is_placeholder(wants: Wants, ids: torch.Tensor) -> torch.Tensor:
    tokens = [getattr(wants.config, name, None) for name in (*PICTURE, *VIDEO, *SOUND)]
    return torch.isin(ids, torch.tensor([token for token in tokens if isinstance(token, int)]))


def _is_one_a_row(wants: Wants, batch: Batch, main: str) -> bool:
    """Whether a sequence with one picture may have several: pictures without further inputs for each."""
    alone = not batch.keys() & {"image_sizes", "qformer_input_ids", "high_res_pixel_values"}
    plain = main == "pixel_values" and batch[main].dim() == 4 and alone
    return plain and batch[main].shape[0] == wants.rows


def _features(wants: Wants, batch: Batch, method: str) -> int | None:
    """Return how many features the pictures or clips of `batch` become; None where no method computes them."""
    holder: Any = wants.model
    path = next((path for path in ("", "model") if hasattr(_inner(holder, path), method)), None)
    if path is None:
        return None
    width = wants.text("hidden_size") or wants.text("d_model")
    with tracing(1) as machine, torch.no_grad():
        twin = _inner(traced_copy(wants.model, machine, lambda _: 0), path)
        twin.eval()
        arguments = _arguments(getattr(twin, method), wants, batch, machine)
        try:
            features = getattr(twin, method)(**arguments)
        except Exception as error:
            raise CannotTrace(f"{wants.kind}.{method} fails in a dry run ({type(error).__name__})") from error
        total = sum(tensor.numel() for tensor in _tensors(features))
    return None if not width else total // width


def _features_of_grid(wants: Wants, batch: Batch) -> int | None:
    """Return how many features the pictures of a Qwen-VL model become: 4.51 has no method of their own for them."""
    grid, vision = batch.get("image_grid_thw"), getattr(wants.config, "vision_config", None)
    if grid is None:
        return None
    return int(grid.prod(-1).sum()) // getattr(vision, "spatial_merge_size", 1) ** 2


def _arguments(method: Any, wants: Wants, batch: Batch, machine: Any) -> Batch:
    accepted = inspect.signature(method).parameters
    dtype = next(
        (parameter.dtype for parameter in wants.model.parameters() if parameter.is_floating_point()), torch.float32
    )
    arguments = {
        name: traced(value.to(dtype) if value.is_floating_point() else value, 0, machine)
        for name, value in batch.items()
        if name in accepted and isinstance(value, torch.Tensor)
    }
    for source, alias in (("feature_attention_mask", "input_features_mask"), ("pixel_values", "pixel_values")):
        if alias in accepted and alias not in arguments and source in batch:
            arguments[alias] = traced(batch[source], 0, machine)
    # 4.x has no defaults for what its own forward takes from the config.
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if name in accepted and accepted[name].default is inspect.Parameter.empty:
            arguments[name] = getattr(wants.config, name)
    return arguments


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the features in the output of such a method: `pooler_output` (5.x), a tensor, or one a picture."""
    if isinstance(output, Mapping):
        output = output.get("pooler_output", next(iter(output.values()), None))
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        if output and isinstance(output[0], (list, tuple)):  # Qwen3-VL, 4.57: features, and those of inner layers
            output = output[0]
        yield from (item for item in output if isinstance(item, torch.Tensor))


def _inner(model: "nn.Module", path: str) -> Any:
    return getattr(model, path, None) if path else model
