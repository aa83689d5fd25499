"""The supposed batches of a model: with all that its class takes, then with less, for those that refuse that."""

from typing import Any

import torch
from torch import nn

from ...workload import Workload
from ..errors import CannotTrace
from .families import of_family
from .pictures import IMAGE_TOKENS, pictures
from .placeholders import PICTURE, SOUND, with_placeholders
from .sound import sound
from .targets import targets
from .text import text
from .wants import Batch, Wants, pair

MOST_TOKENS = 1 << 24  # in a batch; they have numbers, and more than this many would fill the host's own memory


def supposed_batches(model: nn.Module, workload: Workload) -> list[Batch]:
    """Return batches of plain tensors for `model`, the one to try first in front.

    Raises:
        CannotTrace: the inputs of this model are unknown, or larger than this machine could hold.
    """
    if workload.tokens > MOST_TOKENS:
        raise CannotTrace(f"{workload.batch_size} x {workload.seq_len} tokens are too many for a dry run")
    wants = Wants(model, workload.batch_size, workload.seq_len)
    reads = "input_ids" in wants.accepted
    tokens = text(wants) if reads else {}
    seen_and_heard, reasons = _seen_and_heard(wants, tokens)
    if not tokens and not seen_and_heard:
        raise CannotTrace(f"{wants.kind} takes inputs of no known kind")
    batches: list[Batch] = []
    if seen_and_heard:
        try:
            batches.append(_complete(wants, with_placeholders(wants, {**tokens, **seen_and_heard})))
        except CannotTrace as error:
            reasons.append(str(error))
    if tokens and (not batches or wants.ids(*PICTURE, *SOUND) is not None or "aspect_ratio_ids" in wants.accepted):
        batches.append(_complete(wants, dict(tokens)))
    if not batches:
        raise CannotTrace(reasons[0])
    return batches


def _seen_and_heard(wants: Wants, tokens: Batch) -> tuple[Batch, list[str]]:
    """Return pictures and sound, with the tokens as these want them, and why there are none."""
    plain = {**pictures(wants), **sound(wants)}
    try:
        inputs = of_family(wants, {**tokens, **plain})
    except CannotTrace as error:
        return {}, [str(error)]
    return inputs if plain or inputs.keys() != tokens.keys() else {}, []


def _complete(wants: Wants, batch: Batch) -> Batch:
    """Return `batch` with targets, and nothing that its `forward` does not take."""
    inputs = dict(batch)
    if "input_ids" not in wants.accepted:  # models of text and pictures cast them themselves
        dtype = next(
            (parameter.dtype for parameter in wants.model.parameters() if parameter.is_floating_point()), torch.float32
        )
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    both = {**inputs, **targets(wants, batch)}
    return {name: value for name, value in both.items() if name in wants.accepted}


def supposed_pictures(model: nn.Module, tower: nn.Module, workload: Workload) -> Batch:
    """Return the inputs of the vision tower of `model` by itself: pictures for a good part of each row.

    Raises:
        CannotTrace: the size of the tower's inputs is unknown.
    """
    vision: Any = getattr(tower, "config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size is None or patch is None:
        raise CannotTrace("the inputs of its tower are not known")
    height, width = pair(size)
    patch = pair(patch)[0]
    shrunk = getattr(getattr(model, "config", None), "downsample_ratio", 1) ** 2  # InternVL's word for merging patches
    tokens = max(1, int(height // patch * (width // patch) * shrunk))
    count = workload.batch_size * max(1, min(IMAGE_TOKENS, workload.seq_len // 2) // tokens)
    return {"pixel_values": torch.zeros(count, getattr(vision, "num_channels", 3), height, width)}
