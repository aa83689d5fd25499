"""Targets: the labels of a model of each kind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .wants import Batch, Wants, first_of, pair, whole_numbers

# The names under which models take targets.
TARGETS = frozenset(
    {
        "labels", "start_positions", "end_positions", "next_sentence_label", "sentence_order_label", "mask_labels",
        "class_labels", "bool_masked_pos", "return_loss", "future_values", "audio_labels", "text_labels",
    }
)  # fmt: skip
OBJECTS = 2  # in a picture
MOST_CTC_TOKENS = 32


def targets_of(model: nn.Module) -> frozenset[str]:
    """Return the names of the targets that `model` takes."""
    return Wants(model, 1, 1).accepted & TARGETS


def targets(wants: Wants, batch: Batch) -> Batch:
    """Return the targets for `batch`; none where the class's targets are unknown."""
    result: Batch = {}
    if {"start_positions", "end_positions"} <= wants.accepted:
        result |= {name: whole_numbers(wants.rows) for name in ("start_positions", "end_positions")}
    for name in ("next_sentence_label", "sentence_order_label"):
        if name in wants.accepted:
            result[name] = whole_numbers(wants.rows)
    if "return_loss" in wants.accepted:
        result["return_loss"] = True
    if "bool_masked_pos" in wants.accepted:
        result |= _masked_patches(wants, batch)
    if {"mask_labels", "class_labels"} <= wants.accepted:
        result |= _masks(wants, batch)
    if "labels" in wants.accepted:
        labels = _labels(wants, batch)
        result |= {} if labels is None else {"labels": labels}
    return result


def _labels(wants: Wants, batch: Batch) -> Any:
    for ends, make in _BY_KIND:
        if wants.kind.endswith(ends):
            return make(wants, batch)
    if "input_ids" in batch and "decoder_input_ids" not in wants.accepted and "pixel_values" not in wants.accepted:
        ids: torch.Tensor = batch["input_ids"]
        return ids.clone()
    return _sequence(wants, batch)


def _classes(wants: Wants, _: Batch) -> torch.Tensor:
    """Return a class a row, or the values of a regression or of several labels."""
    labels = getattr(wants.config, "num_labels", 2)
    if getattr(wants.config, "problem_type", None) == "multi_label_classification":
        return torch.zeros(wants.rows, labels)
    if labels == 1 or getattr(wants.config, "problem_type", None) == "regression":
        return torch.zeros(wants.rows) if labels == 1 else torch.zeros(wants.rows, labels)
    return whole_numbers(wants.rows)


def _choices(wants: Wants, _: Batch) -> torch.Tensor:
    return whole_numbers(wants.rows)


def _of_tokens(_: Wants, batch: Batch) -> torch.Tensor | None:
    return torch.zeros_like(batch["input_ids"]) if "input_ids" in batch else None


def _sequence(wants: Wants, batch: Batch) -> torch.Tensor | None:
    """Return the tokens that are to come: the batch's own, or those of a decoder."""
    if "input_ids" in batch:
        ids: torch.Tensor = batch["input_ids"]
        return ids.clone()
    if not {"decoder_input_ids", "decoder_attention_mask"} & wants.accepted:
        return None
    config = first_of(wants.config, "decoder", default=wants.config)
    longest = first_of(config, "max_target_positions", "max_position_embeddings", "n_positions")
    tokens = min(wants.tokens, longest) if isinstance(longest, int) else wants.tokens
    return whole_numbers(wants.rows, tokens, value=3)


def _ctc(wants: Wants, _: Batch) -> torch.Tensor:
    return whole_numbers(wants.rows, max(1, min(MOST_CTC_TOKENS, wants.tokens // 8)), value=1)


def _frames(wants: Wants, batch: Batch) -> torch.Tensor | None:
    """Return one-hot classes of each frame that the convolutions leave."""
    lengths = getattr(wants.model, "_get_feat_extract_output_lengths", None)
    samples = batch.get("input_values")
    if lengths is None or samples is None:
        return None
    return torch.zeros(wants.rows, int(lengths(samples.shape[1])), wants.config.num_labels)


def _pixels(wants: Wants, batch: Batch) -> torch.Tensor | None:
    pictures = batch.get("pixel_values")
    return None if pictures is None else whole_numbers(pictures.shape[0], *pictures.shape[-2:])


def _boxes(wants: Wants, batch: Batch) -> list[dict[str, torch.Tensor]]:
    objects = {"class_labels": whole_numbers(OBJECTS), "boxes": torch.full((OBJECTS, 4), 0.5)}
    if "Segmentation" in wants.kind and "pixel_values" in batch:
        objects["masks"] = torch.zeros(OBJECTS, *batch["pixel_values"].shape[-2:])
    return [{name: value.clone() for name, value in objects.items()} for _ in range(wants.rows)]


def _nothing(_: Wants, __: Batch) -> None:
    return None


_BY_KIND: tuple[tuple[tuple[str, ...], Callable[[Wants, Batch], Any]], ...] = (
    (("ForMultipleChoice", "ForNextSentencePrediction"), _choices),
    (("ForTokenClassification",), _of_tokens),
    (("ForAudioFrameClassification",), _frames),
    (("Classification", "WithTeacher", "ForXVector"), _classes),
    (("ForCTC",), _ctc),
    (("ForSemanticSegmentation",), _pixels),
    (("ForObjectDetection", "ForSegmentation", "ForInstanceSegmentation"), _boxes),
    (("ForDepthEstimation", "ForPoseEstimation", "ForImageSegmentation", "ForMaskedImageModeling"), _nothing),
)


def _masked_patches(wants: Wants, batch: Batch) -> Batch:
    config = wants.config
    if "pixel_values" not in batch or not hasattr(config, "patch_size"):
        return {}
    height, width = pair(config.patch_size)
    sides = batch["pixel_values"].shape[-2:]
    masked = torch.zeros(wants.rows, (sides[0] // height) * (sides[1] // width), dtype=torch.bool)
    masked[:, 0] = True
    return {"bool_masked_pos": masked}


def _masks(wants: Wants, batch: Batch) -> Batch:
    if "pixel_values" not in batch:
        return {}
    sides = batch["pixel_values"].shape[-2:]
    return {
        "mask_labels": [torch.zeros(OBJECTS, *sides) for _ in range(wants.rows)],
        "class_labels": [whole_numbers(OBJECTS) for _ in range(wants.rows)],
    }
