"""Programs that write "cuda" run on simulated devices: the name is translated where a device enters torch.

`torch.device("cuda:1")`, `device="cuda"`, `.cuda()`, `.to("cuda")`, `torch.autocast("cuda")` and their like mean the
simulated device for whoever writes them, because there is no CUDA here that they could mean. A tensor's device stays
what it is: `tensor.device.type` is "npu" and `tensor.is_cuda` is false.

`torch.cuda.is_available()` and the other functions of that module answer for the simulated devices only where the
program itself asks. Installed libraries support "npu" by that name; told of CUDA devices as well, they would mix both.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.types import Device

from ..virtual.machine import Machine
from .tensor import BACKEND

_PlainDevice = torch.device  # torch's own class, also once `torch.device` is replaced
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like", "asarray")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
# Classes and context managers, which have no caller to ask for: nothing else could use them here.
_CLASSES = ("Event", "Stream", "device", "device_of", "stream")


def translated(device: Any) -> Any:
    """Return `device` as torch takes it here: "cuda:1" is "npu:1"; other values are returned as they are."""
    if isinstance(device, str):
        if device == "cuda" or device.startswith("cuda:"):
            return BACKEND + device[4:]
    elif type(device) is _PlainDevice and device.type == "cuda":
        return _PlainDevice(BACKEND) if device.index is None else _PlainDevice(BACKEND, device.index)
    return device


class _DeviceKind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _PlainDevice)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return cls is subclass or issubclass(subclass, _PlainDevice)


class device(metaclass=_DeviceKind):  # named as torch names it
    """Stands in for `torch.device`, which takes no subclasses; it makes torch's own objects."""

    __module__ = "torch"
    __qualname__ = "device"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # torch's own
        return _PlainDevice(*map(translated, args), **{name: translated(value) for name, value in kwargs.items()})


def replacements(machine: Machine, module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """Yield owner, name and replacement of everything that is patched; `module` is the one of the simulated devices."""
    from torch.utils._device import _device_constructors

    # Under `with torch.device(...)` torch looks its own functions up in this set, which it makes once: with them, now.
    constructors = _device_constructors()
    yield torch, "device", device
    for name in sorted({function.__name__ for function in constructors} | set(_LIKE)):
        original = getattr(torch, name, None)
        if original is not None:
            yield torch, name, _by_keyword(original)
    for name in _NEW:
        yield torch.Tensor, name, _by_keyword(getattr(torch.Tensor, name))
    yield torch.Tensor, "to", _anywhere(torch.Tensor.to)
    yield torch.Tensor, "cuda", _to_device(machine)
    yield torch.nn.Module, "to", _anywhere(torch.nn.Module.to)
    yield torch.nn.Module, "to_empty", _by_keyword(torch.nn.Module.to_empty)
    yield torch.autocast, "__init__", _anywhere(torch.autocast.__init__)
    yield torch.amp.GradScaler, "__init__", _scaler(torch.amp.GradScaler.__init__)
    for name in ("get_autocast_dtype", "set_autocast_dtype", "set_autocast_enabled"):
        yield torch, name, _anywhere(getattr(torch, name))
    yield torch, "is_autocast_enabled", _with_default(torch.is_autocast_enabled)
    yield torch, "get_autocast_gpu_dtype", functools.partial(torch.get_autocast_dtype, BACKEND)
    yield torch, "get_device_module", _anywhere(torch.get_device_module)
    yield torch.cuda, "default_generators", machine.generators.each
    for name in ("mark", "range_pop", "range_push"):  # the marks of a profiler, which need CUDA's library
        yield torch.cuda.nvtx, name, lambda *_, **__: 0
    for name in _CLASSES:
        yield torch.cuda, name, getattr(module, name)
    for owner in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, answer in vars(module).items():
            original = vars(owner).get(name)
            if isinstance(original, FunctionType) and not name.startswith("_"):
                # Whoever finds default generators asks which device is the current one (transformers' Reformer does).
                yield owner, name, answer if name == "current_device" else _by_caller(original, answer)


def _by_keyword(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = translated(kwargs["device"])
        if kwargs.get("pin_memory"):  # there is no pinned memory without a driver, and nothing here needs it
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return function


def _anywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(translated, args))
        for name in ("device", "device_type"):
            if name in kwargs:
                kwargs[name] = translated(kwargs[name])
        return original(*args, **kwargs)

    return function


def _with_default(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def is_autocast_enabled(device_type: str = BACKEND) -> Any:  # without an argument torch means CUDA
        return original(translated(device_type))

    return is_autocast_enabled


def _scaler(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, device: Any = "cuda", *args: Any, **kwargs: Any) -> None:
        original(self, translated(device), *args, **kwargs)

    return __init__


def _to_device(machine: Machine) -> Callable[..., Any]:
    def cuda(
        self: torch.Tensor,
        device: Device = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.Tensor:
        """Return this tensor on a simulated device, by default on the current one."""
        place = machine.devices[machine.index_of(translated(device))]
        return self.to(place, non_blocking=non_blocking, memory_format=memory_format)

    return cuda


def _by_caller(original: Callable[..., Any], simulated: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not _is_program(sys._getframe(1).f_code.co_filename):
            return original(*args, **kwargs)
        kwargs = {name: translated(value) for name, value in kwargs.items()}
        return simulated(*map(translated, args), **kwargs)

    return function


@functools.cache
def _is_program(path: str) -> bool:
    """Whether a file belongs to the program, and neither to an installed library nor to this package."""
    parts = path.split(os.sep)
    return "site-packages" not in parts and "dist-packages" not in parts and not path.startswith(_PACKAGE)
