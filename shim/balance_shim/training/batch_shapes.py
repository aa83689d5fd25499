"""The shapes of a micro-batch: compared with those that a plan holds for, and made longer to plan ahead."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BatchShapes:
    """The shapes of a micro-batch, which decide its memory.

    Attributes:
        shapes: name of each tensor that the model takes -> its shape.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def covers(self, other: "BatchShapes", factor: float = 1.0) -> bool:
        """Whether `other` takes no more memory than this, with sequences `factor` times as long and in sum as large.

        Fewer tokens in shorter sequences take no more, however they are arranged.
        """
        for name, shape in other.shapes.items():
            own_shape = self.shapes.get(name)
            if own_shape is None or len(own_shape) != len(shape):
                return False
            if _elements(shape) > factor * _elements(own_shape):
                return False
            if any(size > factor * most for size, most in zip(shape[1:], own_shape[1:], strict=True)):
                return False
        return True


def shapes_of(inputs: Any, names: Collection[str] | None) -> BatchShapes | None:
    """Return the shapes of the tensors in `inputs`; None where these are no mapping, or hold none.

    Args:
        names: those that the model takes; None: any.
    """
    if not isinstance(inputs, Mapping):
        return None
    shapes = {
        name: tuple(value.shape)
        for name, value in inputs.items()
        if (names is None or name in names) and getattr(value, "ndim", 0) > 0 and hasattr(value, "element_size")
    }
    return BatchShapes(shapes) if shapes else None


def inputs_of(model: "nn.Module") -> frozenset[str] | None:
    """Return the names of the inputs of `model.forward`; None: any."""
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    named = [parameter for parameter in parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(named) <= 1:  # (self, **kwargs)
        return None
    return frozenset(parameter.name for parameter in named)


def on_host(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with integers on the host, whose values decide what a model runs; of others the shape."""
    import torch

    def seen(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point() or value.is_complex():
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return value.detach().cpu()

    return {name: seen(value) for name, value in inputs.items()}


def with_length(batch: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return `batch` with sequences padded to `length` tokens by their last token, if they are shorter.

    Batches without a matrix of `input_ids` stay as they are.
    """
    ids: Any = batch.get("input_ids")
    if len(getattr(ids, "shape", ())) != 2 or not 0 < ids.shape[1] < length:
        return dict(batch)
    return {name: _longer(value, int(ids.shape[1]), length) for name, value in batch.items()}


def _longer(value: Any, before: int, length: int) -> Any:
    """Return a tensor of whole numbers with each dimension but the first that counts tokens brought to `length`."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return value
    for dimension in range(1, value.ndim):
        if value.shape[dimension] == before:
            last = value.narrow(dimension, before - 1, 1)
            more = [length - before if place == dimension else -1 for place in range(value.ndim)]
            value = torch.cat([value, last.expand(more)], dimension)
    return value


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
