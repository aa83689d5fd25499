"""Scaled dot-product attention that keeps what the kernels of a device keep.

For a backend that it does not know torch falls back to plain matrix products and keeps the whole S x S matrix of
probabilities for backward. Real accelerators have fused kernels that keep the inputs, the output and one log-sum-exp a
row instead, for the types, masks and heads that these kernels take (`device_rules.attention`).

Shapes: B batch, H heads, S queries, D width of a head.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..device_rules.attention import AttentionCall, decided
from .dispatch import mismatch
from .machine import Machine
from .math_attention import math_attention
from .tensor import VirtualTensor, wrap

plain_attention = torch.nn.functional.scaled_dot_product_attention


class _FusedAttention(torch.autograd.Function):
    """The numbers come from torch's CPU attention, forward and backward; the bytes are a fused kernel's."""

    @staticmethod
    def forward(
        ctx: Any,
        machine: Machine,
        query: VirtualTensor,
        key: VirtualTensor,
        value: VirtualTensor,
        mask: VirtualTensor | None,
        options: dict[str, Any],
    ) -> VirtualTensor:
        place = query.place
        ctx.machine, ctx.options, ctx.random_state = machine, options, None
        if query.raw.is_meta:
            raw = query.raw.new_empty((*query.shape[:-1], value.shape[-1]))
        else:
            with contextlib.ExitStack() as drawing:
                if options["dropout_p"]:
                    if machine.generators is not None:
                        drawing.enter_context(machine.generators.drawing(place))
                    ctx.random_state = torch.get_rng_state()
                raw = plain_attention(query.raw, key.raw, value.raw, None if mask is None else mask.raw, **options)
        if raw.dim() == 4:  # fused kernels write B, S, H, D, so that putting heads side by side copies nothing
            raw = raw.transpose(1, 2).contiguous().transpose(1, 2)
        out = wrap(raw, place, machine)
        if machine.watcher is not None:
            machine.watcher.attended(
                place, query.raw, key.raw, value.raw, None if mask is None else mask.raw, backward=False
            )
        log_sum_exp = wrap(raw.new_empty(raw.shape[:-1], dtype=torch.float32), place, machine)
        ctx.save_for_backward(query, key, value, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: VirtualTensor) -> tuple[Any, ...]:
        *inputs, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:5]
        if grad.raw.is_meta:
            gradients: Sequence[torch.Tensor] = [
                torch.empty_like(tensor.raw) for tensor, need in zip(inputs, needed, strict=True) if need
            ]
        else:
            gradients = _real_gradients(ctx, inputs, needed, grad.raw)
        if ctx.machine.watcher is not None:
            raws = [None if tensor is None else tensor.raw for tensor in inputs]
            ctx.machine.watcher.attended(grad.place, *raws, backward=True)
        results = iter(wrap(raw, grad.place, ctx.machine) for raw in gradients)
        return None, *(next(results) if need else None for need in needed), None


def _real_gradients(
    ctx: Any, inputs: Sequence[VirtualTensor | None], needed: Sequence[bool], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    raws: list[Any] = [
        None if tensor is None else tensor.raw.detach().requires_grad_(need)
        for tensor, need in zip(inputs, needed, strict=True)
    ]
    with torch.enable_grad(), torch.random.fork_rng(devices=(), enabled=ctx.random_state is not None):
        if ctx.random_state is not None:
            torch.set_rng_state(ctx.random_state)
        out = plain_attention(*raws, **ctx.options)
    return torch.autograd.grad(out, [raw for raw, need in zip(raws, needed, strict=True) if need], grad)


def make_attention(machine: Machine) -> Callable[..., torch.Tensor]:
    """Return the replacement of `aten::scaled_dot_product_attention` on the devices of `machine`."""

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
        for tensor in tensors:
            if not isinstance(tensor, VirtualTensor) or tensor.place != query.place:
                raise mismatch("aten::scaled_dot_product_attention", query, tensor)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # CUDA's kernels turn truth values into a bias of the queries' type, and keep that.
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        call = _call(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if any(decided(call, architecture) == "math" for architecture in machine.architectures_at(query.place)):
            machine.math_attention.add(call)
            return math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        arguments = machine, query, key, value, attn_mask, options
        out: torch.Tensor = _FusedAttention.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return out

    return attention


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> AttentionCall:
    has_heads = query.dim() > 2
    return AttentionCall(
        dtype=query.dtype,
        query_heads=query.shape[-3] if has_heads else 1,
        key_heads=key.shape[-3] if has_heads else 1,
        width=query.shape[-1],
        value_width=value.shape[-1],
        has_mask=mask is not None,
        enable_gqa=enable_gqa,
        dropout=float(dropout_p),
        is_causal=is_causal,
        is_square=query.shape[-2] == key.shape[-2],
        requires_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)),
        dimensions=query.dim(),
    )
