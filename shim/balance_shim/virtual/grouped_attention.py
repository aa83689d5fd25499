"""Grouped queries: where keys and values are repeated for all heads, so that a fused kernel runs.

transformers (4.54 on) hands grouped queries to torch as they are where there is no mask (`enable_gqa`). torch's
memory-efficient kernel, the only fused one for float32 and before compute capability 8.0, does not take them, so that
attention runs as plain matrix products and keeps the S x S probabilities of every head. With keys and values repeated
that kernel runs: O(S) instead of O(S^2), with the same values up to rounding.
"""

import os
from collections.abc import Callable, Collection
from functools import lru_cache, wraps
from typing import Any

import torch

from ..device_rules.attention import AttentionCall, decided
from ..device_rules.kinds import INSISTS_ON_GROUPS, Architecture
from .tensor import VirtualTensor

MODULE, NAME = "transformers.integrations.sdpa_attention", "use_gqa_in_sdpa"


def around_use_gqa(
    original: Callable[..., bool], acts: Callable[[Any], bool], acted: Callable[[Any], None]
) -> Callable[..., bool]:
    """Return transformers' `use_gqa_in_sdpa`, answered False where repeating keys and values saves the S x S matrix.

    Args:
        acts: asked with the key whether this is a call to answer otherwise at all.
        acted: called with the key where the answer is changed.
    """

    @wraps(original)
    def use_gqa_in_sdpa(attention_mask: Any, key: Any, *args: Any, **kwargs: Any) -> bool:
        uses_groups = original(attention_mask, key, *args, **kwargs)
        if (
            not uses_groups
            or attention_mask is not None
            or os.environ.get(INSISTS_ON_GROUPS, "0") == "1"
            or not acts(key)
        ):
            return uses_groups
        value = args[0] if args else kwargs.get("value", key)
        if not is_better_repeated(key, value):
            return True
        acted(key)
        return False

    return use_gqa_in_sdpa


def is_better_repeated(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether grouped queries with these keys (B, H, S, D) run as plain matrix products, and fused when repeated."""
    return repeating_helps(_computed_in(key), key.shape[-1], value.shape[-1], key.requires_grad, architectures_of(key))


def repeating_helps(
    dtype: torch.dtype, width: int, value_width: int, requires_grad: bool, architectures: Collection[Architecture]
) -> bool:
    """Whether repeated keys and values keep devices of these architectures from plain matrix products."""
    grouped = AttentionCall(
        dtype, 2, 1, width, value_width, enable_gqa=True, is_causal=True, requires_grad=requires_grad
    )
    repeated = grouped._replace(key_heads=2, enable_gqa=False)
    needs = any(decided(grouped, architecture) == "math" for architecture in architectures)
    return needs and all(decided(repeated, architecture) != "math" for architecture in architectures)


def kind_of(tensor: torch.Tensor) -> str:
    """Return the type of numbers and the device that `tensor` is computed with, for people to read."""
    dtype = str(_computed_in(tensor)).removeprefix("torch.")
    capabilities = {architecture.capability for architecture in architectures_of(tensor) if architecture.capability}
    return f"{dtype} on compute capability " + " and ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def architectures_of(tensor: torch.Tensor) -> tuple[Architecture, ...]:
    """Return the architectures that the device of `tensor` may have; one, except in a trace for several."""
    if isinstance(tensor, VirtualTensor):
        return tensor.machine.architectures_at(tensor.place)
    if tensor.device.type != "cuda":
        return ()
    return (_real_architecture(tensor.device.index or 0),)


@lru_cache
def _real_architecture(index: int) -> Architecture:
    capability = torch.cuda.get_device_capability(index)
    return Architecture("hip" if torch.version.hip else "cuda", capability)


def _computed_in(tensor: torch.Tensor) -> torch.dtype:
    kind = tensor.device.type
    if tensor.is_floating_point() and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
