"""Places where torch's C++ or Python side knows nothing of a backend without an allocator or storages of its own."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.jit import _builtins

from ..virtual.machine import Machine
from ..virtual.tensor import _plain_data, set_data
from . import cuda_names, data_parallel, engine, factories, process_group
from .autocast import _CastWeights
from .generators import Generator
from .tensor import BACKEND, SimulatedTensor


def apply(machine: Machine, module: ModuleType, weights: _CastWeights) -> contextlib.ExitStack:
    """Replace those functions; closing the returned stack puts the originals back."""
    undo = contextlib.ExitStack()
    with contextlib.ExitStack() as failed:
        failed.push(undo)
        for owner, name, replacement in _replacements(machine, module, weights):
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)
            _keep_scriptable(getattr(owner, name, None), replacement, undo)
            setattr(owner, name, replacement)
        failed.pop_all()
    return undo


def _keep_scriptable(original: Any, replacement: Any, undo: contextlib.ExitStack) -> None:
    """Let TorchScript compile calls of `replacement` to the operator of `original`, which it knows by identity."""
    operator = _builtins._find_builtin(original)
    if operator is not None:
        _builtins._register_builtin(replacement, operator)
        undo.callback(_builtins._get_builtin_table().pop, id(replacement), None)


def _replacements(machine: Machine, module: ModuleType, weights: _CastWeights) -> Iterator[tuple[Any, str, Any]]:
    yield torch.autograd.graph, "_engine_run_backward", engine.run_backward
    yield torch.autograd, "_engine_run_backward", engine.run_backward
    yield torch.Tensor, "data", property(_plain_data.__get__, _assign_data, _plain_data.__delete__)
    # `module.to(device)` asks whether parameters can keep their identity; `set_data` sees to it that they do.
    yield torch, "_has_compatible_shallow_copy_type", _compatible
    yield torch, "Generator", Generator
    # There is no pinned memory without a driver. Nothing needs it here: copies to simulated devices are plain copies.
    yield torch.Tensor, "pin_memory", lambda self, device=None: self
    yield torch.Tensor, "is_pinned", lambda self, device=None: False
    # Optimizers and gradient clipping take all tensors at once on accelerators, with temporaries as large as they all,
    # but only tensors of types listed here.
    for path in ("torch.optim.optimizer", "torch.utils._foreach_utils"):  # torch.optim hides the former's name
        owner = importlib.import_module(path)
        yield owner, "_foreach_supported_types", [*owner._foreach_supported_types, SimulatedTensor]
    yield torch, "clear_autocast_cache", _clearing(torch.clear_autocast_cache, weights)
    yield torch, "load", _loading(torch.load, machine)
    for name in (
        "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats",
        "reset_peak_memory_stats", "reset_accumulated_memory_stats", "empty_cache", "synchronize", "device_count",
        "get_device_capability", "current_stream", "set_stream",
    ):  # fmt: skip
        yield torch.accelerator, name, getattr(module, name)
    yield torch.accelerator, "get_memory_info", module.mem_get_info
    for name in ("current_device_index", "current_device_idx"):
        yield torch.accelerator, name, module.current_device
    for name in ("set_device_index", "set_device_idx"):
        yield torch.accelerator, name, module.set_device
    yield torch.accelerator, "device_index", module.device
    # transformers 4.52 to 5.2 subtract these for the devices of any map, whatever their type.
    yield torch.cuda, "memory_reserved", lambda device=None: 0
    yield torch.cuda, "memory_allocated", lambda device=None: 0
    if torch.distributed.is_available():
        yield torch.distributed, "init_process_group", _starting(torch.distributed.init_process_group)
        yield torch.distributed, "Reducer", _reducing(torch.distributed.Reducer)
    yield from cuda_names.replacements(machine, module)
    yield from data_parallel.replacements(machine)


def _assign_data(self: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(value, SimulatedTensor):
        set_data(self, value)
    else:
        _plain_data.__set__(self, value)


_both_plain = torch._has_compatible_shallow_copy_type


def _compatible(input: torch.Tensor, from_: torch.Tensor) -> bool:  # torch.compile insists on this very signature
    if isinstance(input, SimulatedTensor) or isinstance(from_, SimulatedTensor):
        return True
    return _both_plain(input, from_)


def _starting(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        original(process_group.translated_backend(backend), *args, **kwargs)

    return init_process_group


def _reducing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_reducer(*args: Any, **kwargs: Any) -> Any:
        # DDP's record of parameters without gradients is copied to its device through pinned memory, which needs a
        # driver; a record on the host is sent as it is.
        with factories.integers_on_host():
            return original(*args, **kwargs)

    return make_reducer


def _clearing(original: Callable[[], None], weights: _CastWeights) -> Callable[[], None]:
    @functools.wraps(original)
    def clear_autocast_cache() -> None:
        weights.clear()
        original()

    return clear_autocast_cache


def _loading(original: Callable[..., Any], machine: Machine) -> Callable[..., Any]:
    """Files hold the tensors of simulated devices as CPU tensors: those asked for on a device are moved there."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        map_location = cuda_names.translated(map_location)
        if isinstance(map_location, int):
            map_location = machine.devices[map_location]
        if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == BACKEND:
            place = machine.devices[machine.index_of(map_location)]
            return _moved(original(f, "cpu", *args, **kwargs), place)
        return original(f, map_location, *args, **kwargs)

    return load


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        value.data = value.detach().to(device)
        return value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _moved(item, device)
    elif isinstance(value, list):
        value[:] = [_moved(item, device) for item in value]
    elif type(value) is tuple:
        return tuple(_moved(item, device) for item in value)
    return value
