"""Labels of each task, by the names that the class's `forward` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .fields import lookup

Example = dict[str, Any]
LISTED = frozenset({"mask_labels", "class_labels"})  # lists of tensors in a batch, one per example
OF_IMAGES = frozenset(
    {"image-classification", "segmentation", "instance-segmentation", "detection", "depth", "masked-image"}
)


@dataclass(frozen=True)
class Target:
    """Makes the labels of one example from its inputs; see `batches.Proposal` for `own_loss`."""

    labels_of: Callable[[Example, torch.Generator], Example]
    own_loss: bool = False


def of(model: Any, task: str, parameters: set[str]) -> Iterator[Target]:
    """Yield the labels that the class might take, the likeliest first."""
    yield from MAKERS[task](model, parameters)
    yield Target(lambda example, generator: {}, own_loss=True)


def vocabulary_of(model: Any) -> int:
    """Return the id that ordinary words stay below."""
    return min(200, lookup(model.config, "vocab_size", default=200))


def _tokens(model: Any, parameters: set[str]) -> Iterator[Target]:
    def same(example: Example, generator: torch.Generator) -> Example:
        if "input_ids" not in example:
            return {"labels": torch.randint(8, 200, (12,), generator=generator)}
        labels = example["input_ids"].clone()
        labels[labels >= 256] = -100  # places of pictures and sounds
        return {"labels": labels}

    if "labels" in parameters:
        yield Target(same)


def _answer(model: Any, parameters: set[str]) -> Iterator[Target]:
    def text(example: Example, generator: torch.Generator) -> Example:
        return {"labels": torch.randint(8, vocabulary_of(model), (12,), generator=generator)}

    def with_decoder(example: Example, generator: torch.Generator) -> Example:
        labels = torch.randint(8, vocabulary_of(model), (12,), generator=generator)
        return {"labels": labels, "decoder_input_ids": labels.roll(1)}

    if "decoder_input_ids" not in parameters:
        yield from _tokens(model, parameters)
    yield Target(text)
    if "decoder_input_ids" in parameters:
        yield Target(with_decoder)


def _tokens_or_answer(model: Any, parameters: set[str]) -> Iterator[Target]:
    if "decoder_input_ids" in parameters:
        yield from _answer(model, parameters)
    yield from _tokens(model, parameters)
    yield from _class(model, parameters)


def _span(model: Any, parameters: set[str]) -> Iterator[Target]:
    def span(example: Example, generator: torch.Generator) -> Example:
        return {"start_positions": torch.tensor(3), "end_positions": torch.tensor(7)}

    def and_entity(example: Example, generator: torch.Generator) -> Example:
        return {**span(example, generator), "labels": torch.tensor(1)}

    if "start_positions" in parameters:
        yield Target(span)
        yield Target(and_entity)
    else:
        yield from _class(model, parameters)


def _classes_of_tokens(model: Any, parameters: set[str]) -> Iterator[Target]:
    def classes(example: Example, generator: torch.Generator) -> Example:
        return {"labels": torch.randint(0, _number(model), example["input_ids"].shape[:1], generator=generator)}

    yield Target(classes)


def _number(model: Any) -> int:
    return int(getattr(model.config, "num_labels", 2) or 2)


def _class(model: Any, parameters: set[str]) -> Iterator[Target]:
    def index(example: Example, generator: torch.Generator) -> Example:
        return {"labels": torch.randint(0, _number(model), (), generator=generator)}

    def scores(example: Example, generator: torch.Generator) -> Example:
        return {"labels": torch.rand(_number(model), generator=generator)}

    if "labels" in parameters:
        yield Target(index)
        yield Target(scores)


def _choice(model: Any, parameters: set[str]) -> Iterator[Target]:
    yield Target(lambda example, generator: {"labels": torch.randint(0, 2, (), generator=generator)})


def _map_of_classes(model: Any, parameters: set[str]) -> Iterator[Target]:
    def mask(example: Example, generator: torch.Generator) -> Example:
        size = example["pixel_values"].shape[-2:]
        return {"labels": torch.randint(0, _number(model), tuple(size), generator=generator)}

    yield Target(mask)
    yield from _objects(model, parameters)


def _masks(model: Any, parameters: set[str]) -> Iterator[Target]:
    def masks(example: Example, generator: torch.Generator) -> Example:
        size = example["pixel_values"].shape[-2:]
        return {
            "mask_labels": (torch.rand(2, *size, generator=generator) > 0.5).float(),
            "class_labels": torch.randint(0, _number(model), (2,), generator=generator),
        }

    def and_task(example: Example, generator: torch.Generator) -> Example:
        length = lookup(model.config, "task_seq_len", default=77)
        queries = lookup(model.config, "num_queries", default=12) - lookup(
            model.config, "text_encoder_n_ctx", default=0
        )
        ids = torch.randint(8, 200, (queries, lookup(model.config, "text_encoder_context_length", default=77)))
        return {
            **masks(example, generator),
            "task_inputs": torch.randint(8, 200, (length,), generator=generator),
            "text_inputs": ids,
        }

    if "task_inputs" in parameters:
        yield Target(and_task)
    yield Target(masks)


def _objects(model: Any, parameters: set[str]) -> Iterator[Target]:
    def boxes(example: Example, generator: torch.Generator) -> Example:
        middle = torch.rand(2, 2, generator=generator) * 0.4 + 0.3
        sizes = torch.rand(2, 2, generator=generator) * 0.2 + 0.1
        classes = torch.randint(0, _number(model), (2,), generator=generator)
        return {"labels": {"class_labels": classes, "boxes": torch.cat([middle, sizes], -1)}}

    def and_masks(example: Example, generator: torch.Generator) -> Example:
        size = example["pixel_values"].shape[-2:]
        labels = boxes(example, generator)["labels"]
        return {"labels": {**labels, "masks": (torch.rand(2, *size, generator=generator) > 0.5).float()}}

    if "labels" in parameters:
        yield Target(boxes)
        yield Target(and_masks)


def _depth(model: Any, parameters: set[str]) -> Iterator[Target]:
    def depth(example: Example, generator: torch.Generator) -> Example:
        return {"labels": torch.rand(tuple(example["pixel_values"].shape[-2:]), generator=generator) + 0.5}

    yield Target(depth)


def _hidden_patches(model: Any, parameters: set[str]) -> Iterator[Target]:
    def hidden(example: Example, generator: torch.Generator) -> Example:
        config = model.config
        patch = lookup(config, "patch_size", default=4)
        patch = patch if isinstance(patch, int) else patch[0]
        image = example["pixel_values"].shape[-1]
        strides = lookup(config, "encoder_stride", default=patch)
        number = (image // patch) ** 2
        del strides
        return {"bool_masked_pos": torch.arange(number) % 2 == 0}

    yield Target(hidden)


MAKERS: dict[str, Callable[[Any, set[str]], Iterator[Target]]] = {
    "causal-lm": _tokens,
    "image-text-to-text": _tokens_or_answer,
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
    "visual-question-answering": _tokens_or_answer,
}
