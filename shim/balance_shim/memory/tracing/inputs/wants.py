"""The inputs that a model takes: the parameters of its `forward`, and the sizes in its config."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Wants:
    """The facts that a supposed batch is made from.

    Attributes:
        model: the model to feed.
        rows: sequences, pictures or clips in a micro-batch.
        tokens: tokens of a sequence.
    """

    model: nn.Module
    rows: int
    tokens: int

    @cached_property
    def accepted(self) -> frozenset[str]:
        """The names that `forward` takes."""
        return frozenset(inspect.signature(inspect.unwrap(type(self.model).forward)).parameters)

    @property
    def kind(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    def text(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the language model's config, or of the model's own."""
        config = self.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, name, getattr(config, name, default))

    def ids(self, *names: str) -> int | None:
        """Return the token that the config has under the first of `names` that it has."""
        values = (getattr(self.config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)


Batch = dict[str, Any]


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute of `config` among `names` that is set."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size that is a number or has two."""
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else next(iter(size.values()))
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def whole_numbers(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int64)
