"""Mixed precision on simulated devices.

For a backend written in Python torch brings the switch but no rules. These follow CUDA's: `device_rules.autocast`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..device_rules.autocast import LOWER, SINGLE, SINGLE_BY_ARGUMENT, WIDEST
from .tensor import BACKEND, SimulatedTensor

_Type = TypeVar("_Type", torch.dtype, None)
_KEY = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))


class _CastWeights:
    """Weights in the lower type, kept until autocast ends, because a weight is used again in the same forward."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32
        if not (weight and torch.is_autocast_cache_enabled() and torch.is_grad_enabled()):
            return tensor.to(dtype)
        entry = self._found.get(id(tensor))
        if entry is None or entry[1].dtype is not dtype:
            entry = self._found[id(tensor)] = (tensor, tensor.to(dtype))
        return entry[1]

    def clear(self) -> None:
        self._found.clear()


def register() -> "tuple[list[torch.library.Library], _CastWeights]":
    """Register the rules, for as long as the returned libraries live; autocast's end must clear the weights."""
    weights = _CastWeights()
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    for names, make in ((LOWER, _lower), (SINGLE, _single), (SINGLE_BY_ARGUMENT, _by_argument), (WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if func is not None:  # lists differ a little between versions of torch
                library.impl(name, make(func, weights), "AutocastPrivateUse1")
    return [everything, library], weights


def _lower(func: torch._ops.OpOverload, weights: _CastWeights) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(BACKEND)
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return func(*_each(args, dtype, weights.cast), **_each(kwargs, dtype, weights.cast))

    return kernel


def _single(func: torch._ops.OpOverload, _: _CastWeights) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return func(*_each(args, torch.float32, torch.Tensor.to), **_each(kwargs, torch.float32, torch.Tensor.to))

    return kernel


def _by_argument(func: torch._ops.OpOverload, _: _CastWeights) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            if _castable(args[0]) and kwargs.get("dtype") is None and len(args) < len(func._schema.arguments):
                kwargs["dtype"] = torch.float32
            return func(*args, **kwargs)

    return kernel


def _widest(func: torch._ops.OpOverload, _: _CastWeights) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        types: set[torch.dtype] = set()
        _each(args, None, lambda tensor, _: types.add(tensor.dtype))
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            if len(types) < 2:
                return func(*args, **kwargs)
            widest = torch.float32 if torch.float32 in types else types.pop()
            return func(*_each(args, widest, torch.Tensor.to), **_each(kwargs, widest, torch.Tensor.to))

    return kernel


def _castable(value: Any) -> bool:
    return type(value) is SimulatedTensor and value.is_floating_point() and value.dtype is not torch.float64


def _each(value: Any, dtype: _Type, cast: Callable[[torch.Tensor, _Type], Any]) -> Any:
    if _castable(value):
        return cast(value, dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, dtype, cast) for item in value)
    if isinstance(value, dict):
        return {name: _each(item, dtype, cast) for name, item in value.items()}
    return value
