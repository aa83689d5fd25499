"""Attention by plain matrix products, step by step as torch does it on CUDA, so that each tensor is counted.

Source: `_scaled_dot_product_attention_math` and `_safe_softmax` in aten/src/ATen/native/transformers/attention.cpp of
torch 2.13. torch's own function would do on virtual tensors, except that for tensors written in Python it adds the mask
out of place.

Shapes: B batch, H heads, S queries, T keys, D width of a head.
"""

from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Return the attention of `query` (B, H, S, D) to `key` and `value` (B, H or fewer, T, D) in the type of `query`.

    Kept for the backward pass: the probabilities B x H x S x T, scaled queries and keys, and values, all for all heads
    and in float32 unless half types may be reduced in their own precision.
    """
    dtype = query.dtype
    if dtype in _HALF and not _reduces_in_half():
        query, key, value = query.to(torch.float32), key.to(torch.float32), value.to(torch.float32)
    factor = abs(scale if scale is not None else query.shape[-1] ** -0.5) ** 0.5
    query = query * (-factor if scale is not None and scale < 0 else factor)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(allowed.logical_not(), float("-inf"))
        del allowed
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = torch.matmul(query, key.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    probabilities = _SafeSoftmax.apply(scores)  # type: ignore[no-untyped-call]  # torch does not annotate it
    del scores
    if dropout_p > 0:
        probabilities = torch.native_dropout(probabilities, dropout_p, True)[0]
    out = torch.matmul(probabilities, value).to(dtype)
    probabilities.detach().to(dtype)  # the second result, which nobody takes
    return out


def _reduces_in_half() -> bool:
    allowed = getattr(torch.backends.cuda, "fp16_bf16_reduction_math_sdp_allowed", None)  # torch 2.5
    return allowed is not None and allowed()


class _SafeSoftmax(torch.autograd.Function):
    """Softmax that gives zeros for a row that is masked altogether; keeps its result alone."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        result = torch.softmax(scores, -1)
        is_masked = torch.isneginf(scores).all(-1, keepdim=True)
        result = torch.where(is_masked, torch.zeros((), dtype=result.dtype, device=result.device), result)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (result,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data.default(grad, result, -1, result.dtype)
