"""Batches as a user's collator makes them, for any class: by task, by the parameters of `forward` and by the config.

Written without regard to the batches that the shim supposes, so that the sweep tests those. Where one of several forms
may be right, `proposals` yields one after the other; the first that trains on one device is the one that counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import audio, pictures, targets
from .fields import lookup
from .targets import Example

LENGTH = 24  # tokens of a sequence of words
CLASSES = 3


@dataclass(frozen=True)
class Proposal:
    """One form of the training data.

    Attributes:
        examples: what the data set holds.
        joined: the entries that the collator concatenates; it stacks the others, and keeps lists of dictionaries.
        own_loss: whether the user's Trainer computes the loss, from the first floating tensor that the model returns.
        inputs: for the table, what goes in.
    """

    examples: list[Example]
    joined: frozenset[str] = field(default_factory=frozenset)
    own_loss: bool = False
    inputs: str = ""


def collate(examples: list[Example], joined: frozenset[str]) -> dict[str, Any]:
    """Return the batch of `examples`."""
    batch: dict[str, Any] = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if not isinstance(first, torch.Tensor) or name in targets.LISTED:
            batch[name] = values
        else:
            batch[name] = torch.cat(values) if name in joined else torch.stack(values)
    return batch


def proposals(model: Any, task: str, count: int) -> Iterator[Proposal]:
    """Yield forms of `count` examples for `model`, the most complete first."""
    parameters = set(inspect.signature(model.forward).parameters)
    for inputs in _inputs(model, task, parameters):
        names = ", ".join(inputs.makes)
        for target in targets.of(model, task, parameters):
            examples = []
            for number in range(count):
                generator = torch.Generator().manual_seed(number)
                example = inputs.example(generator)
                examples.append({**example, **target.labels_of(example, generator)})
            yield Proposal(examples, frozenset(inputs.joined), target.own_loss, names)


def _inputs(model: Any, task: str, parameters: set[str]) -> Iterator[pictures.Inputs]:
    if task in ("image-text-to-text", "visual-question-answering"):
        yield from pictures.with_words(model, parameters, LENGTH)
    elif task in ("speech-seq2seq", "ctc", "audio-classification"):
        yield from audio.of(model, parameters, LENGTH)
        yield from pictures.with_words(model, parameters, LENGTH)
    elif task == "video-classification":
        yield from pictures.videos(model, parameters)
    elif task in targets.OF_IMAGES:
        if "input_ids" in parameters and "pixel_values" in parameters:
            yield from pictures.with_words(model, parameters, LENGTH)
        yield from pictures.alone(model, parameters)
    yield from pictures.text_inputs(model, task, parameters, LENGTH)
    if task == "seq2seq":
        yield from audio.of(model, parameters, LENGTH)


__all__ = ["CLASSES", "LENGTH", "Proposal", "collate", "lookup", "proposals"]
