"""Making tensors on simulated devices: operations that torch dispatches by the device asked for, as no tensor is."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.types import Device

from ..virtual import shapes
from ..virtual.machine import Machine
from ..virtual.tensor import wrap
from .tensor import SimulatedTensor

aten = torch.ops.aten

# `zeros`, `full`, `rand` and the like need no entry: torch makes them of `empty` and an operation in place.
# These do, because torch would make them by resizing an empty tensor inside C++.
_COMPUTED = (
    "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm",
    "randperm.generator", "tril_indices", "triu_indices", "hann_window", "hamming_window", "blackman_window",
    "bartlett_window", "kaiser_window", "scalar_tensor", "fft_fftfreq", "fft_rfftfreq",
)  # fmt: skip


@contextmanager
def integers_on_host() -> Iterator[None]:
    """Make empty tensors of 32-bit integers on the host, whatever device they are asked for on."""
    global _integers_on_host
    _integers_on_host = True
    try:
        yield
    finally:
        _integers_on_host = False


_integers_on_host = False


def register(machine: Machine) -> torch.library.Library:
    """Register the kernels with torch, for as long as the returned library lives."""
    library = torch.library.Library("aten", "IMPL")

    def empty(
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: Device = None,
        pin_memory: bool | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        return make(size, None, dtype, device, memory_format)

    def empty_strided(
        size: Sequence[int],
        stride: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: Device = None,
        pin_memory: bool | None = None,
    ) -> torch.Tensor:
        return make(size, stride, dtype, device, None)

    def make(
        size: Sequence[int],
        stride: Sequence[int] | None,
        dtype: torch.dtype | None,
        device: Device,
        memory_format: torch.memory_format | None,
    ) -> torch.Tensor:
        dtype = dtype or torch.get_default_dtype()
        if _integers_on_host and dtype == torch.int32:
            return torch.empty(size, dtype=dtype, device=shapes.HOST)
        place = machine.index_of(device)
        count = math.prod(size)
        machine.ledger.require(count * dtype.itemsize, place)
        real = not machine.shapes_only or shapes.is_real(dtype, count)
        target = shapes.HOST if real else shapes.META
        if stride is not None:
            raw = aten.empty_strided.default(size, stride, dtype=dtype, device=target)
        else:
            raw = aten.empty.memory_format(size, dtype=dtype, device=target, memory_format=memory_format)
        return wrap(raw, place, machine)

    def computed(func: torch._ops.OpOverload) -> Callable[..., torch.Tensor]:
        random = torch.Tag.nondeterministic_seeded in func.tags
        if func is aten.randperm.default:
            func = aten.randperm.generator

        def kernel(*args: Any, device: Device = None, pin_memory: bool | None = None, **kwargs: Any) -> torch.Tensor:
            place = machine.index_of(device)
            if random:
                kwargs["generator"] = machine.generators.checked(kwargs.get("generator"), place)
            raw = func(*args, device=shapes.HOST, **kwargs)
            if machine.shapes_only:
                raw = shapes.thinned(raw)
            return wrap(raw, place, machine)

        return kernel

    # These two are for `torch.tensor(numbers, device=...)`, which works with the dispatch of subclasses switched off.
    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return copy(source, target)

    def number(tensor: torch.Tensor) -> Any:
        return SimulatedTensor.run(aten._local_scalar_dense.default, (tensor,), {})

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("_copy_from_and_resize", copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", number, "PrivateUse1")
    for name in _COMPUTED:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet, None), overload or "default", None)
        if func is not None:
            library.impl(name, computed(func), "PrivateUse1")
    return library


def copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy the numbers of `source` into `target`, either of which may be simulated, or without numbers."""
    raw_source = source.raw if isinstance(source, SimulatedTensor) else source
    raw_target = target.raw if isinstance(target, SimulatedTensor) else target
    if not raw_source.is_meta and not raw_target.is_meta:
        raw_target.copy_(raw_source)
    return target


def register_attention(attention: Callable[..., torch.Tensor]) -> torch.library.Library:
    """Register `aten::scaled_dot_product_attention` with torch, for as long as the returned library lives."""
    library = torch.library.Library("aten", "IMPL")
    # At autograd's key, where torch would otherwise take the operation apart; it also holds for calls from C++.
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    return library
