"""Labels of each task, by the names that the class's `forward` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .fields import lookup

Row = dict[str, Any]
LISTED = frozenset({"mask_labels", "class_labels"})  # lists of tensors in a batch, one a row
OF_IMAGES = frozenset(
    {"image-classification", "segmentation", "instance-segmentation", "detection", "depth", "masked-image"}
)


@dataclass(frozen=True)
class Target:
    """Makes the labels of one row from its inputs; see `batches.Proposal` for `own_loss`."""

    row: Callable[[Row, torch.Generator], Row]
    own_loss: bool = False


def of(model: Any, task: str, parameters: set[str]) -> Iterator[Target]:
    """Yield the labels that the class might take, the likeliest first."""
    yield from MAKERS[task](model, parameters)
    yield Target(lambda row, generator: {}, own_loss=True)


def words_of(model: Any) -> int:
    """Return the id that ordinary words stay below."""
    return min(200, lookup(model.config, "vocab_size", default=200))


def _tokens(model: Any, parameters: set[str]) -> Iterator[Target]:
    def same(row: Row, generator: torch.Generator) -> Row:
        if "input_ids" not in row:
            return {"labels": torch.randint(8, 200, (12,), generator=generator)}
        labels = row["input_ids"].clone()
        labels[labels >= 256] = -100  # places of pictures and sounds
        return {"labels": labels}

    if "labels" in parameters:
        yield Target(same)


def _answer(model: Any, parameters: set[str]) -> Iterator[Target]:
    def text(row: Row, generator: torch.Generator) -> Row:
        return {"labels": torch.randint(8, words_of(model), (12,), generator=generator)}

    def with_decoder(row: Row, generator: torch.Generator) -> Row:
        labels = torch.randint(8, words_of(model), (12,), generator=generator)
        return {"labels": labels, "decoder_input_ids": labels.roll(1)}

    if "decoder_input_ids" not in parameters:
        yield from _tokens(model, parameters)
    yield Target(text)
    if "decoder_input_ids" in parameters:
        yield Target(with_decoder)


def _words_or_answer(model: Any, parameters: set[str]) -> Iterator[Target]:
    if "decoder_input_ids" in parameters:
        yield from _answer(model, parameters)
    yield from _tokens(model, parameters)
    yield from _class(model, parameters)


def _span(model: Any, parameters: set[str]) -> Iterator[Target]:
    def span(row: Row, generator: torch.Generator) -> Row:
        return {"start_positions": torch.tensor(3), "end_positions": torch.tensor(7)}

    def and_entity(row: Row, generator: torch.Generator) -> Row:
        return {**span(row, generator), "labels": torch.tensor(1)}

    if "start_positions" in parameters:
        yield Target(span)
        yield Target(and_entity)
    else:
        yield from _class(model, parameters)


def _classes_of_tokens(model: Any, parameters: set[str]) -> Iterator[Target]:
    def classes(row: Row, generator: torch.Generator) -> Row:
        return {"labels": torch.randint(0, _number(model), row["input_ids"].shape[:1], generator=generator)}

    yield Target(classes)


def _number(model: Any) -> int:
    return int(getattr(model.config, "num_labels", 2) or 2)


def _class(model: Any, parameters: set[str]) -> Iterator[Target]:
    def index(row: Row, generator: torch.Generator) -> Row:
        return {"labels": torch.randint(0, _number(model), (), generator=generator)}

    def scores(row: Row, generator: torch.Generator) -> Row:
        return {"labels": torch.rand(_number(model), generator=generator)}

    if "labels" in parameters:
        yield Target(index)
        yield Target(scores)


def _choice(model: Any, parameters: set[str]) -> Iterator[Target]:
    yield Target(lambda row, generator: {"labels": torch.randint(0, 2, (), generator=generator)})


def _map_of_classes(model: Any, parameters: set[str]) -> Iterator[Target]:
    def mask(row: Row, generator: torch.Generator) -> Row:
        size = row["pixel_values"].shape[-2:]
        return {"labels": torch.randint(0, _number(model), tuple(size), generator=generator)}

    yield Target(mask)
    yield from _objects(model, parameters)


def _masks(model: Any, parameters: set[str]) -> Iterator[Target]:
    def masks(row: Row, generator: torch.Generator) -> Row:
        size = row["pixel_values"].shape[-2:]
        return {
            "mask_labels": (torch.rand(2, *size, generator=generator) > 0.5).float(),
            "class_labels": torch.randint(0, _number(model), (2,), generator=generator),
        }

    def and_task(row: Row, generator: torch.Generator) -> Row:
        length = lookup(model.config, "task_seq_len", default=77)
        queries = lookup(model.config, "num_queries", default=12) - lookup(
            model.config, "text_encoder_n_ctx", default=0
        )
        ids = torch.randint(8, 200, (queries, lookup(model.config, "text_encoder_context_length", default=77)))
        return {
            **masks(row, generator),
            "task_inputs": torch.randint(8, 200, (length,), generator=generator),
            "text_inputs": ids,
        }

    if "task_inputs" in parameters:
        yield Target(and_task)
    yield Target(masks)


def _objects(model: Any, parameters: set[str]) -> Iterator[Target]:
    def boxes(row: Row, generator: torch.Generator) -> Row:
        middle = torch.rand(2, 2, generator=generator) * 0.4 + 0.3
        sizes = torch.rand(2, 2, generator=generator) * 0.2 + 0.1
        classes = torch.randint(0, _number(model), (2,), generator=generator)
        return {"labels": {"class_labels": classes, "boxes": torch.cat([middle, sizes], -1)}}

    def and_masks(row: Row, generator: torch.Generator) -> Row:
        size = row["pixel_values"].shape[-2:]
        labels = boxes(row, generator)["labels"]
        return {"labels": {**labels, "masks": (torch.rand(2, *size, generator=generator) > 0.5).float()}}

    if "labels" in parameters:
        yield Target(boxes)
        yield Target(and_masks)


def _depth(model: Any, parameters: set[str]) -> Iterator[Target]:
    def depth(row: Row, generator: torch.Generator) -> Row:
        return {"labels": torch.rand(tuple(row["pixel_values"].shape[-2:]), generator=generator) + 0.5}

    yield Target(depth)


def _hidden_patches(model: Any, parameters: set[str]) -> Iterator[Target]:
    def hidden(row: Row, generator: torch.Generator) -> Row:
        config = model.config
        patch = lookup(config, "patch_size", default=4)
        patch = patch if isinstance(patch, int) else patch[0]
        image = row["pixel_values"].shape[-1]
        strides = lookup(config, "encoder_stride", default=patch)
        number = (image // patch) ** 2
        del strides
        return {"bool_masked_pos": torch.arange(number) % 2 == 0}

    yield Target(hidden)


MAKERS: dict[str, Callable[[Any, set[str]], Iterator[Target]]] = {
    "causal-lm": _tokens,
    "image-text-to-text": _words_or_answer,
    "seq2seq": _answer,
    "speech-seq2seq": _answer,
    "ctc": _answer,
    "question-answering": _span,
    "token-classification": _classes_of_tokens,
    "sequence-classification": _class,
    "masked-lm": _tokens,
    "multiple-choice": _choice,
    "image-classification": _class,
    "segmentation": _map_of_classes,
    "instance-segmentation": _masks,
    "detection": _objects,
    "depth": _depth,
    "masked-image": _hidden_patches,
    "video-classification": _class,
    "audio-classification": _class,
    "visual-question-answering": _words_or_answer,
}
