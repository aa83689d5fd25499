"""Compare the attention kernel that torch chooses on the card with the rule of the plans, and measure what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from balance_shim.device_rules.attention import AttentionCall, chosen_by_torch, kernel_for
from balance_shim.device_rules.kinds import Architecture

from .card import Card

LENGTH = 2048
CALLS = tuple(
    AttentionCall(
        dtype, 28, key_heads, width, width, has_mask=has_mask, enable_gqa=key_heads != 28, is_causal=not has_mask
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for key_heads in (28, 4)
    for width in (64, 128, 256)
    for has_mask in (False, True)
)


def compared(card: Card) -> Iterator[dict[str, Any]]:
    if card.is_simulated:
        yield {"skipped": "torch chooses among CUDA's kernels on a CUDA device only"}
        return
    architecture = Architecture("hip" if torch.version.hip else "cuda", torch.cuda.get_device_capability(0))
    for call in CALLS:
        record: dict[str, Any] = {
            "dtype": str(call.dtype).removeprefix("torch."), "heads": f"{call.query_heads}/{call.key_heads}",
            "width": call.width, "mask": call.has_mask, "rule": kernel_for(call, architecture),
        }  # fmt: skip
        try:
            record["torch"] = chosen_by_torch(call, card.device)
            record["agrees"] = record["torch"] == record["rule"] or "math" not in (record["torch"], record["rule"])
            record |= _kept(card, call)
        except RuntimeError as error:
            record["error"] = str(error).splitlines()[0]
        yield record
        card.empty()


def _kept(card: Card, call: AttentionCall) -> dict[str, int]:
    """Return the bytes that a forward pass keeps, inputs not counted, and the most that the backward pass holds."""

    def made(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, LENGTH, width, dtype=call.dtype, device=card.device, requires_grad=True)

    inputs = (
        made(call.query_heads, call.width),
        made(call.key_heads, call.width),
        made(call.key_heads, call.value_width),
    )
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=call.dtype, device=card.device) if call.has_mask else None
    before = card.module.memory_allocated(0)
    with card.measured() as peaks:
        out = torch.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=mask, is_causal=call.is_causal, enable_gqa=call.enable_gqa
        )
        held_for_backward = card.module.memory_allocated(0) - before
        out.sum().backward()
    return {"kept": held_for_backward, "backward": peaks[0].allocated - before}
