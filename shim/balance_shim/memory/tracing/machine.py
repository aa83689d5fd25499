"""The machine to trace on: devices `cpu:0`, `cpu:1`, ... without limits, whose tensors have shapes and no numbers.

Whole numbers and truth values stay real (see `virtual/shapes.py`), so models that look at their token ids run. Nothing
of a real accelerator is touched; other programs in this process notice nothing.
"""

import contextlib
import contextvars
import io
import logging
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...device_rules.attention import AttentionCall
from ...device_rules.kinds import DEFAULT_ARCHITECTURE, Architecture
from ...rng import undisturbed
from ...virtual import attention, grouped_attention, shapes
from ...virtual.dispatch import Dispatcher
from ...virtual.machine import Machine
from ...virtual.tensor import VirtualTensor, wrap
from .errors import CannotTrace

MOST_DEVICES = 120  # torch numbers devices with a signed byte
# Operations in a trace. Models of today take a few thousand; one that goes through its rows token by token (state space
# models without their kernels) takes hundreds of thousands, which is minutes that no program should wait for a plan.
MOST_OPERATIONS = 60_000
_LIMITLESS = 1 << 60

_one_at_a_time = threading.Lock()


@dataclass
class Target:
    """The devices to trace for, and the facts noted on the way.

    Attributes:
        architectures: of the devices that a block may land on; the costliest of their kernels counts.
        math_attention: the calls of attention that ran as plain matrix products.
        repeats: whether keys and values are repeated where that saves them (see `virtual.grouped_attention`).
        repeated: whether any were.
    """

    architectures: tuple[Architecture, ...] = (DEFAULT_ARCHITECTURE,)
    math_attention: set[AttentionCall] = field(default_factory=set)
    repeats: bool = True
    repeated: bool = False


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("balance_shim_target", default=None)


@contextlib.contextmanager
def tracing_for(architectures: Collection[Architecture], repeats: bool = True) -> Iterator[Target]:
    """Let traces in this context follow the rules of devices of these architectures."""
    target = Target(tuple(sorted(set(architectures), key=str)) or (DEFAULT_ARCHITECTURE,), repeats=repeats)
    token = _target.set(target)
    try:
        yield target
    finally:
        _target.reset(token)


class TooManyOperations(Exception):
    """A trace has gone on for so long that it is given up."""


class _Bounded(Dispatcher):
    """Runs no more than `MOST_OPERATIONS` operations."""

    _done = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._done += 1
        if self._done > MOST_OPERATIONS:
            raise TooManyOperations(f"more than {MOST_OPERATIONS:,} operations in a step")
        return super().__call__(func, args, kwargs)


class TracedTensor(VirtualTensor):
    """A tensor of the trace under way."""

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        """Return it on the host, which torch takes a tensor on `cpu:1` to be on already."""
        raw = self.raw.detach()
        return shapes.blank(raw.shape, raw.dtype) if raw.is_meta else raw.clone()


def traced(tensor: torch.Tensor, index: int, machine: Machine) -> torch.Tensor:
    """Return a tensor on traced device `index` that looks like `tensor`, with its numbers if they are whole numbers."""
    if not tensor.is_meta and type(tensor) is torch.Tensor and shapes.is_real(tensor.dtype, tensor.numel()):
        return wrap(tensor.detach().cpu().clone(), index, machine)
    raw = torch.empty_strided(tensor.shape, _dense_strides(tensor), dtype=tensor.dtype, device=shapes.META)
    return wrap(raw, index, machine)


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return strides in the order of the tensor's own but without gaps: expanded tensors are loaded in full."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return torch.empty(tensor.shape, device=shapes.META).stride()
    return tensor.stride()


@contextlib.contextmanager
def tracing(devices: int, with_real: bool = False) -> Iterator[Machine]:
    """Trace in this thread, on `devices` devices, until the context ends.

    Args:
        with_real: whether modules with real weights may run, too; otherwise they are refused.
    """
    target = _target.get() or Target()
    machine = Machine(
        "cpu",
        [_LIMITLESS] * devices,
        TracedTensor,
        shapes_only=True,
        separates_host=False,
        alternatives=target.architectures,
        caches=False,
    )
    machine.math_attention = target.math_attention
    fused = attention.make_attention(machine)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        TracedTensor.machine = machine
        TracedTensor.run = _Bounded(machine, fused)
        stack.enter_context(undisturbed())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_default_dtype(torch.float32))
        stack.enter_context(_accelerators_kernels(fused))
        stack.enter_context(_grouped_queries(target))
        stack.enter_context(_tensors_of_numbers())
        stack.enter_context(_silence())
        stack.enter_context(_Factories(machine, with_real))
        yield machine


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output of the model and its library: it will appear again in the real training."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # transformers' way to log a line once, which remembers its arguments, shown or not.
    once: Any = getattr(logging.Logger, "warning_once", None)
    try:
        if once is not None:
            logging.Logger.warning_once = lambda *_, **__: None  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if once is not None:
            logging.Logger.warning_once = once  # type: ignore[attr-defined]
        logging.disable(before)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _accelerators_kernels(fused: Any) -> Iterator[None]:
    """Let attention and dropout keep the tensors that an accelerator's kernels keep.

    The CPU's own choice of attention depends on types and masks, and its dropout keeps noise as wide as its input
    instead of a truth value for each.
    """
    functions: Any = torch.nn.functional
    plain_attention, plain_dropout = functions.scaled_dot_product_attention, functions.dropout

    def scaled_dot_product_attention(query: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(query, TracedTensor):
            return plain_attention(query, *args, **kwargs)
        if not torch.is_autocast_enabled("cpu"):
            return fused(query, *args, **kwargs)
        named = {name: _cast(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return fused(_cast(query), *map(_cast, args), **named)

    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if isinstance(input, TracedTensor) and training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return plain_dropout(input, p, training, inplace)

    functions.scaled_dot_product_attention, functions.dropout = scaled_dot_product_attention, dropout
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = plain_attention, plain_dropout


@contextlib.contextmanager
def _grouped_queries(target: Target) -> Iterator[None]:
    """Let transformers treat grouped queries as it does in a training with the shim."""
    module = sys.modules.get(grouped_attention.MODULE)
    before = getattr(module, grouped_attention.NAME, None)
    if before is None or not target.repeats:
        yield
        return

    def acted(_: Any) -> None:
        target.repeated = True

    def is_traced(key: Any) -> bool:
        return isinstance(key, TracedTensor)

    setattr(module, grouped_attention.NAME, grouped_attention.around_use_gqa(before, is_traced, acted))
    try:
        yield
    finally:
        setattr(module, grouped_attention.NAME, before)


@contextlib.contextmanager
def _tensors_of_numbers() -> Iterator[None]:
    """Let `torch.tensor([one, two])` take traced numbers, whose memory it would read without asking them."""
    before = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return before(_numbers(data), *args, **kwargs)

    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = before


def _numbers(data: Any) -> Any:
    if isinstance(data, TracedTensor):
        return data.tolist()
    return type(data)(map(_numbers, data)) if type(data) in (list, tuple) else data


def _cast(value: Any) -> Any:
    """Return `value` as autocast hands it to attention, which it would not see here."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.get_autocast_dtype("cpu"))
    return value


class _Factories(TorchDispatchMode):
    """Makes tensors on traced devices: `torch.zeros(..., device="cpu:1")` is dispatched by no tensor."""

    def __init__(self, machine: Machine, with_real: bool):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._devices, self._with_real = frozenset(machine.devices), with_real

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if TracedTensor in types or kwargs.get("device") in self._devices:
            return TracedTensor.run(func, args, kwargs)
        if not (self._with_real or func.is_view) and any(
            isinstance(value, torch.nn.Parameter) and not value.is_meta for value in args
        ):
            # Something in the copy still holds the original. To run it would take memory on real devices.
            raise CannotTrace("a function that was put into the model holds on to its real weights")
        return func(*args, **kwargs)
