"""A linear layer with the memory of a quantized one: its weight in full while it multiplies, forward and backward.

Source: `matmul_4bit` of bitsandbytes 0.50 (`autograd/_functions.py`), which dequantizes a whole weight per product and
keeps none of it; `Linear4bit.forward` computes in its `compute_dtype` and returns the type of its input.
"""

from typing import Any

import torch
from torch import nn


class DequantizingLinear(nn.Linear):
    """A frozen linear layer without bias; it multiplies in `compute_dtype`, or for None in the type of its input."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product of `input` and the weight, in the type of `input`."""
        kind = input.device.type
        casts = torch.is_autocast_enabled(kind)
        wide = input.to(torch.get_autocast_dtype(kind) if casts else self.compute_dtype or input.dtype)
        out: torch.Tensor = _Product.apply(wide, self.weight)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return out if casts else out.to(input.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any) -> Any:
        ctx.save_for_backward(weight)
        return torch.matmul(input, _dequantized(weight, input.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return torch.matmul(grad, _dequantized(weight, grad.dtype)), None


def _dequantized(weight: Any, dtype: torch.dtype) -> Any:
    return weight.detach().clone().to(dtype)
