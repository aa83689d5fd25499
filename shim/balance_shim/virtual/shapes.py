"""Tensors without numbers: how a 7 B model trains in seconds on a laptop.

Floating-point tensors are meta tensors inside; whole numbers and truth values stay real, because programs look at
them: token ids, masks and positions decide what a model does. What a program asks of a floating-point tensor gets a
plausible answer, and a size that depends on its values is taken as large as it can be.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import kernels, recurrent, shape_memo
from .machine import Machine
from .tensor import VirtualTensor

HOST = torch.device("cpu")
META = torch.device("meta")
MOST_REAL = 2**26  # elements; an attention mask of 8192 x 8192 still has its values

aten = torch.ops.aten


def is_real(dtype: torch.dtype, count: int) -> bool:
    """Whether a tensor of `count` elements keeps its numbers. Single numbers do: learning rates, step counts."""
    return count <= 1 or (count <= MOST_REAL and not dtype.is_floating_point and not dtype.is_complex)


def thinned(raw: torch.Tensor) -> torch.Tensor:
    """Return `raw`, without its numbers if it should have none."""
    if raw.is_meta or is_real(raw.dtype, raw.numel()):
        return raw
    return _twin(raw)


def blank(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a CPU tensor of zeros that costs no memory until somebody writes to it."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def run(
    func: torch._ops.OpOverload,
    args: list[Any],
    kwargs: dict[str, Any],
    virtual: Sequence[VirtualTensor],
    place: int | None,
    machine: Machine,
) -> Any:
    """Run `func` on raw tensors of which some may be meta, for a result on device `place` (None: on the host)."""
    if not any(tensor.raw.is_meta for tensor in virtual):
        if not virtual and place is not None and kwargs.get("generator") is None:
            result = func(*args, **{**kwargs, "device": META})  # of 16 GiB of zeros the host need not have room for one
            if isinstance(result, torch.Tensor) and not is_real(result.dtype, result.numel()):
                return result
        out = kernels.REAL.get(func, func)(*args, **kwargs)
        return out if place is None else _each(out, thinned)
    if func in _VALUELESS:
        result = func(_twin(args[0]), *args[1:], **{**kwargs, "device": META})
        on_host = place is None and result.numel() <= MOST_REAL
        if on_host or is_real(result.dtype, result.numel()):  # they do not depend on the numbers that nobody knows
            like = torch.zeros((), dtype=args[0].dtype).expand(args[0].shape)
            real = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
            return real.copy_(func(like, *args[1:], **{**kwargs, "device": HOST}))
        return result if place is not None else blank(result.shape, result.dtype)
    answer = _ANSWERS.get(func)
    if answer is not None:
        return answer(*args, **kwargs)
    if func is aten.copy_.default or func is aten._copy_from.default:
        return _copy(func, args, virtual, machine)

    twins: dict[int, torch.Tensor] = {}
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        # Once a number that nobody knows is written to it, a tensor that had numbers has none.
        for value in _written(func, args, kwargs):
            for tensor in virtual:
                if tensor.raw is value and not value.is_meta:
                    _lose(tensor, twins, machine)
    for tensor in virtual:
        raw = tensor.raw
        if not raw.is_meta and id(raw) not in twins:
            twins[id(raw)] = _twin(raw)
    if func in _MASKED:
        args = [args[0], [position for index in args[1] for position in _positions(index)], *args[2:]]
    args = [_replaced(arg, twins) for arg in args]
    kwargs = {name: _replaced(value, twins) for name, value in kwargs.items()}
    if kwargs.get("device") == HOST:
        kwargs["device"] = META
    out = shape_memo.call(func, args, kwargs)
    return _each(out, lambda raw: blank(raw.shape, raw.dtype)) if place is None else out


def _twin(raw: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(raw.shape, raw.stride(), dtype=raw.dtype, device=META)


def _lose(tensor: VirtualTensor, twins: dict[int, torch.Tensor], machine: Machine) -> None:
    twin = twins[id(tensor.raw)] = _twin(tensor.raw)
    machine.ledger.hold(twin, tensor.place)
    tensor.raw = twin


def _copy(
    func: torch._ops.OpOverload, args: Sequence[Any], virtual: Sequence[VirtualTensor], machine: Machine
) -> torch.Tensor:
    target: torch.Tensor
    source: torch.Tensor
    target, source = args[:2] if func is aten.copy_.default else args[1::-1]
    for tensor in virtual:
        if tensor.raw is target and not target.is_meta and source.is_meta:
            _lose(tensor, {}, machine)
            return tensor.raw
    return target  # of two meta tensors nothing is left to copy, and a host tensor cannot learn what nobody knows


def _written(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _replaced(value: Any, twins: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() and not value.is_meta and id(value) not in twins:  # the host's own, where those may mix
            return _twin(value)
        return twins.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return [_replaced(item, twins) for item in value]
    return value


def _each(out: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(out, torch.Tensor):
        return change(out)
    if isinstance(out, (list, tuple)):
        return type(out)(_each(item, change) for item in out)
    return out


def _positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return a mask as the positions that it selects, all of them if nobody knows: masks have no meta kernel."""
    if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    if not index.is_meta:
        return list(index.nonzero().unbind(1))
    if index.dim() != 1:
        raise NotImplementedError("shapes only: selecting by a mask of several dimensions whose values are unknown")
    return [torch.empty(index.shape, dtype=torch.int64, device=index.device)]


# They take shape and type from their first argument, and no value.
_VALUELESS = {
    aten.new_empty.default, aten.new_full.default, aten.new_ones.default, aten.new_zeros.default,
    aten.empty_like.default, aten.full_like.default, aten.ones_like.default, aten.zeros_like.default,
}  # fmt: skip

_MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _number(raw: torch.Tensor) -> bool | float:
    # False: "is any of it not a number?" is what programs ask. Zero is an index that exists. A loss of one is a loss.
    if raw.dtype is torch.bool:
        return False
    return 1.0 if raw.dtype.is_floating_point else 0


def _compared(answer: bool) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """Return a comparison with a single number: values that nobody knows equal none (padding is all zeros)."""

    def compare(raw: torch.Tensor, _: Any) -> torch.Tensor:
        if raw.numel() > MOST_REAL:
            return torch.empty_like(raw, dtype=torch.bool, device=META)
        return blank(raw.shape, torch.bool).logical_not_() if answer else blank(raw.shape, torch.bool)

    return compare


def _ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a loss for each sequence, and what backward keeps: one value for each frame, label and blank."""
    frames, sequences = log_probs.shape[:2]
    longest = targets.shape[1] if targets.dim() == 2 else -(-targets.shape[0] // max(1, sequences))
    alphas = log_probs.new_empty((sequences, frames, 2 * longest + 1), device=META)
    return log_probs.new_empty((sequences,), device=META), alphas


def _ctc_loss_backward(_: torch.Tensor, log_probs: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
    return torch.empty_like(log_probs, device=META)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    **recurrent.STEPS,
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda left, right: left.shape == right.shape,
    aten.eq.Scalar: _compared(False),
    aten.ne.Scalar: _compared(True),
    aten.is_nonzero.default: lambda raw: bool(_number(raw)),
    aten.nonzero.default: lambda raw: torch.empty((raw.numel(), raw.dim()), dtype=torch.int64, device=META),
    aten.masked_select.default: lambda raw, mask: torch.empty(
        torch.broadcast_shapes(raw.shape, mask.shape).numel(), dtype=raw.dtype, device=META
    ),
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._ctc_loss_backward.default: _ctc_loss_backward,
    aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    aten._grouped_mm.default: kernels.grouped_mm_shape,
    aten._amp_foreach_non_finite_check_and_unscale_.default: lambda *_: None,
    aten._amp_update_scale_.default: lambda scale, *_: scale,
}
