"""Operations that accelerators have and torch's CPU or meta tensors have not, in terms of those that they have."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import recurrent

aten = torch.ops.aten


def _histogram(raw: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Counts of whole numbers, as mixtures of experts use it to count the tokens of each expert."""
    numbers = raw if raw.dtype.is_floating_point else raw.to(torch.float32)
    counts: torch.Tensor = aten.histc.default(numbers, *args, **kwargs)
    return counts.to(raw.dtype)


def grouped_mm_shape(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: Any = None,  # a tensor where it is needed
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The result's shape of products of groups. A group dimension that only one factor has is cut up by `offs`."""
    shape: tuple[int, ...]
    if left.dim() == 2 and right.dim() == 2:
        shape = (offs.numel(), left.shape[0], right.shape[1])
    elif left.dim() == 3 and right.dim() == 3:
        shape = (left.shape[0], left.shape[1], right.shape[2])
    else:
        shape = (left.shape[-2], right.shape[-1])
    return left.new_empty(shape, dtype=out_dtype or left.dtype)


def temporary_bytes(func: torch._ops.OpOverload, args: Sequence[Any]) -> int:
    """Return the bytes that an operation takes on CUDA while it runs, beyond its arguments and results."""
    size = _TEMPORARY.get(func)
    return 0 if size is None else size(*args)


_INT64 = 8
# masked_scatter sums the mask up in a whole number for each element (IndexKernel.cpp), and its backward, which selects
# by the mask, finds the positions of what it selects: one number for each dimension (`nonzero`).
_TEMPORARY: dict[Any, Callable[..., int]] = {
    aten.masked_scatter.default: lambda raw, mask, source: raw.numel() * _INT64,
    aten.masked_scatter_.default: lambda raw, mask, source: raw.numel() * _INT64,
    aten.masked_scatter_backward.default: lambda grad, mask, sizes: math.prod(sizes) * mask.dim() * _INT64,
}

REAL: dict[Any, Callable[..., Any]] = {aten.histc.default: _histogram, **recurrent.STEPS}
