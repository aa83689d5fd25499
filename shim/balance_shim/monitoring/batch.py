"""The size of a micro-batch, read from the shapes of its inputs, without synchronizing a device."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class BatchSize(NamedTuple):
    """Rows and tokens a row (padding included; 0 where there are no `input_ids`), elements and bytes of all inputs."""

    rows: int = 0
    row_tokens: int = 0
    elements: int = 0
    bytes: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


def size_of(inputs: Any) -> BatchSize:
    """Return the size of the inputs of a `training_step`; all zeros if they are not a dict of tensors."""
    if not isinstance(inputs, Mapping):
        return BatchSize()
    tensors = [tensor for tensor in inputs.values() if hasattr(tensor, "numel") and hasattr(tensor, "element_size")]
    ids = inputs.get("input_ids")
    shape = tuple(getattr(ids, "shape", ()))
    rows, row_tokens = shape if len(shape) == 2 else (1, shape[0]) if len(shape) == 1 else (0, 0)
    elements = sum(tensor.numel() for tensor in tensors)
    return BatchSize(
        int(rows), int(row_tokens), elements, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    )
