"""A partitioned weight as a script sees it: with the shape of the whole, and never with the values of nothing.

DeepSpeed leaves an empty tensor in the place of a weight that is partitioned. A script that asks for its shape gets 0,
and what it decides then (transformers' own run_clm resizes the vocabulary) is wrong without a word. Here such a
parameter answers for the whole weight: its sizes at once; its values by gathering them, which all ranks have to do
together. DeepSpeed itself, which relies on the empty tensor, sees it as it is, and so do torch and accelerate where
they handle parameters without looking into them.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from ... import log, zero_support
from .. import meeting
from . import gathering, gradients

# Packages whose own code knows of, or does not care for, the empty tensors. transformers gathers before it looks.
KNOWING = ("deepspeed", "torch", "accelerate", "transformers", "peft", "balance_shim")
# Part of one of them that does not: CLIP looks at the number of positions that its embedding has.
UNKNOWING = "transformers.models."
# A module of DeepSpeed's that is called in place of torch.nn.functional.linear, so by anybody.
FOR_ANYBODY = "deepspeed.runtime.zero.linear"

CLIPPING = "torch.nn.utils.clip_grad"  # where a script clips gradients, or measures their norm

# Where torch's functions and methods are written that others call.
TRANSPARENT = ("torch.overrides", "torch._tensor", "torch.functional", "torch.nn.functional", "torch.nn.init")
# Methods of transformers that a script calls to learn how large its model is.
COUNTING = ("num_parameters", "get_memory_footprint")

_tensor: Any = torch.Tensor  # whose attributes are descriptors, which the types of torch do not tell
_SIZES: dict[Any, Callable[..., Any]] = {
    _tensor.size: lambda whole, *dim: whole[dim[0]] if dim else whole,
    _tensor.dim: len,
    _tensor.ndimension: len,
    _tensor.numel: torch.Size.numel,
    _tensor.nelement: torch.Size.numel,
    _tensor.__len__: lambda whole: whole[0],
    _tensor.shape.__get__: lambda whole: whole,
    _tensor.ndim.__get__: len,
}  # fmt: skip


class PartitionedParameter(torch.nn.Parameter):
    """The class that `look_whole` gives to a parameter that DeepSpeed has partitioned."""

    ds_shape: torch.Size  # of the whole weight; DeepSpeed's own attribute

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if _is_getter(function) or _asked_by_the_knowing():
                return function(*args, **kwargs)
            parts = [leaf for leaf in _leaves((args, kwargs)) if is_partitioned(leaf)]
            if not parts:
                return function(*args, **kwargs)
            answer = _SIZES.get(function)
            if answer is not None:
                return answer(torch.Size(parts[0].ds_shape), *args[1:], *kwargs.values())
            return computed(function, getattr(function, "__name__", str(function)), args, kwargs)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self.ds_shape) if is_partitioned(self) and not _asked_by_the_knowing() else _plain_shape(self)

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self.ds_shape) if is_partitioned(self) and not _asked_by_the_knowing() else _plain_ndim(self)

    @property
    def data(self) -> torch.Tensor:
        if is_partitioned(self) and not _asked_by_the_knowing():
            raise zero_support.refusal("weights_data", shape=tuple(self.ds_shape))
        inside: torch.Tensor = _plain_data.__get__(self)
        return inside

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _plain_data.__set__(self, value)

    @property
    def grad(self) -> torch.Tensor | None:
        own: torch.Tensor | None = _plain_grad.__get__(self)
        if own is not None or not gathering.has_optimizer(self):
            return own
        name = _caller(1)
        if name == CLIPPING:
            raise zero_support.refusal("clip_by_torch")
        return own if _is_knowing(name) else gradients.read(self)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        _plain_grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _plain_grad.__set__(self, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy with all values. Ranks do this together."""
        if id(self) not in memo:
            with torch.no_grad():
                if is_partitioned(self):
                    log.once("info", "the script copies partitioned weights: every process holds the copies in full")
                    values = computed(_tensor.clone, "a copy", (self,), {})
                else:
                    values = _plain_data.__get__(self).clone()
            memo[id(self)] = torch.nn.Parameter(values, requires_grad=self.requires_grad)
        return memo[id(self)]


_plain_data: Any = torch.Tensor.data
_plain_grad: Any = torch.Tensor.grad


def _plain_shape(tensor: torch.Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        shape: torch.Size = _tensor.shape.__get__(tensor)
        return shape


def _plain_ndim(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(_tensor.ndim.__get__(tensor))


def look_whole(model: torch.nn.Module) -> None:
    """Have the partitioned parameters of `model` answer for the whole weights."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") and type(parameter) is torch.nn.Parameter:
            parameter.__class__ = PartitionedParameter


def is_partitioned(value: Any) -> bool:
    """Return whether `value` is a parameter of which this rank has a part only, at this moment."""
    if not isinstance(value, torch.nn.Parameter) or "ds_id" not in vars(value):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(torch.Tensor.numel(value) != value.ds_numel)  # type: ignore[attr-defined]


def computed(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """Return the result of `function` for whole weights; written to, they are partitioned again with the new values.

    With gradients the weights stay whole until the backward pass has ended. Where no engine collects their gradients,
    the backward pass raises a `BalanceError` when it comes to them.

    Raises:
        BalanceError: not all ranks are here.
    """
    leaves = _leaves((args, kwargs))
    parts = [leaf for leaf in leaves if is_partitioned(leaf)]
    writes = name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__"))
    trains = not writes and torch.is_grad_enabled()
    trains = trains and any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    meeting.meet(f"`{name}` of a partitioned weight")
    if not trains:
        return _gathered(function, parts, args, kwargs, writes)
    if all(gathering.has_optimizer(weight) for weight in parts if weight.requires_grad):
        gathering.hold(parts)
        return function(*args, **kwargs)
    with torch.no_grad():
        result = _gathered(function, parts, args, kwargs, writes)
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return result
    flows, shape = torch.zeros((), requires_grad=True), tuple(parts[0].ds_shape)
    return _WithoutGradient.apply(result, flows, name, shape)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _gathered(function: Callable[..., Any], parts: list[Any], args: Any, kwargs: Any, writes: bool) -> Any:
    from deepspeed import zero

    gathering.await_prefetch(parts)
    parts = [weight for weight in parts if is_partitioned(weight)]  # others have arrived meanwhile
    if not parts:
        return function(*args, **kwargs)
    with zero.GatheredParameters(parts, modifier_rank=0 if writes else None):
        result = function(*args, **kwargs)
        # What refers to the whole weight would be emptied with it.
        shares = isinstance(result, torch.Tensor) and not writes
        return result.clone() if shares and any(result._base is weight for weight in parts) else result


class _WithoutGradient(torch.autograd.Function):
    """A value that can be read, and not differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Any, mark: Any, name: str, shape: tuple[int, ...]) -> Any:
        del mark  # for which autograd comes here
        ctx.where = (name, shape)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        name, shape = ctx.where
        raise zero_support.refusal("weights_in_loss", operation=name, shape=shape)


def _asked_by_the_knowing() -> bool:
    """Return whether the code that asks belongs to a package that knows of partitioned weights."""
    return _is_knowing(_caller(2))


def _is_knowing(name: str) -> bool:
    return name.partition(".")[0] in KNOWING and name != FOR_ANYBODY and not name.startswith(UNKNOWING)


def _caller(frames: int) -> str:
    """Return the name of the module of the code that is so many frames above the function that calls this."""
    frame: Any = sys._getframe(frames + 1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name not in TRANSPARENT:
            # Before Python 3.12 a comprehension has a frame of its own.
            inner = frame.f_code.co_name in ("<listcomp>", "<genexpr>") and frame.f_back is not None
            function = frame.f_back if inner else frame
            return "" if function.f_code.co_name in COUNTING else name
        frame = frame.f_back
    return ""


def _is_getter(function: Any) -> bool:
    """Return whether `function` reads or sets an attribute, such as `requires_grad` or `device`."""
    return getattr(function, "__name__", "") in ("__get__", "__set__", "__delete__") and function not in _SIZES


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]
