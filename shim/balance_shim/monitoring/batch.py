"""The size of a micro-batch, read from the shapes of its inputs, without synchronizing a device."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class BatchSize(NamedTuple):
    """Sequences and tokens of each (with padding; 0 without `input_ids`), elements and bytes of all inputs."""

    batch_size: int = 0
    seq_len: int = 0
    elements: int = 0
    bytes: int = 0

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


def size_of(inputs: Any) -> BatchSize:
    """Return the size of the inputs of a `training_step`; all zeros if they are not a dict of tensors."""
    if not isinstance(inputs, Mapping):
        return BatchSize()
    tensors = [tensor for tensor in inputs.values() if hasattr(tensor, "numel") and hasattr(tensor, "element_size")]
    ids = inputs.get("input_ids")
    shape = tuple(getattr(ids, "shape", ()))
    batch_size, seq_len = shape if len(shape) == 2 else (1, shape[0]) if len(shape) == 1 else (0, 0)
    elements = sum(tensor.numel() for tensor in tensors)
    return BatchSize(
        int(batch_size),
        int(seq_len),
        elements,
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )
