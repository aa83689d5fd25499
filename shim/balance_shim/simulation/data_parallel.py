"""`torch.nn.DataParallel` on simulated devices, and `TrainingArguments.n_gpu` as it is on as many CUDA devices.

torch copies between devices for it in functions of its CUDA library, which are replaced here: replicas, scattered
inputs, gathered outputs and summed gradients are counted on the devices that have them on CUDA, too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.types import Device

from .. import log
from ..placement import placed_models
from ..virtual.machine import Machine
from .cuda_names import translated
from .tensor import BACKEND


def replacements(machine: Machine) -> Iterator[tuple[Any, str, Any]]:
    """Yield owner, name and replacement of the functions in `torch.nn.parallel.comm`; results are outside of graphs."""
    from torch.nn.parallel import comm

    def place(device: Device) -> torch.device:
        device = translated(device)
        if device == -1 or (device is not None and not isinstance(device, int) and torch.device(device).type == "cpu"):
            return torch.device("cpu")
        return machine.devices[machine.index_of(device)]

    def broadcast(
        tensor: torch.Tensor, devices: Any = None, *, out: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        if out is not None:
            return tuple(target.copy_(tensor) for target in out)
        return tuple(tensor.to(place(device)) for device in devices)

    def broadcast_coalesced(
        tensors: Iterable[torch.Tensor], devices: Iterable[Device], buffer_size: int = 10485760
    ) -> list[list[torch.Tensor]]:
        return [[tensor.detach().to(place(device)) for tensor in tensors] for device in devices]

    def reduce_add(inputs: Sequence[torch.Tensor], destination: Device = None) -> torch.Tensor:
        target = place(destination)
        total = inputs[0].to(target)
        for tensor in inputs[1:]:
            total = total + tensor.to(target)
        return total

    def reduce_add_coalesced(
        inputs: Iterable[Sequence[torch.Tensor]], destination: Device = None, buffer_size: int = 10485760
    ) -> tuple[torch.Tensor, ...]:
        return tuple(reduce_add(tensors, destination) for tensors in zip(*inputs, strict=True))

    def scatter(
        tensor: torch.Tensor,
        devices: Any = None,
        chunk_sizes: Sequence[int] | None = None,
        dim: int = 0,
        streams: Any = None,
        *,
        out: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if out is not None:
            parts = tensor.split([target.shape[dim] for target in out], dim)
            return tuple(target.copy_(part) for target, part in zip(out, parts, strict=True))
        parts = tensor.chunk(len(devices), dim) if chunk_sizes is None else tensor.split(list(chunk_sizes), dim)
        return tuple(part.to(place(device)) for part, device in zip(parts, devices, strict=False))

    def gather(
        tensors: Iterable[torch.Tensor], dim: int = 0, destination: Device = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        target = place(destination) if out is None else out.device
        joined = torch.cat([tensor.to(target) for tensor in tensors], dim)
        return joined if out is None else out.copy_(joined)

    for function in (broadcast, broadcast_coalesced, reduce_add, reduce_add_coalesced, scatter, gather):
        yield comm, function.__name__, function


def count_devices_as_on_cuda(module: ModuleType) -> None:
    """Let `TrainingArguments` of one process count all devices; `module` is `transformers.training_args`.

    For "npu" they count one. Scripts compute with `n_gpu` and `train_batch_size` before they make a Trainer.
    """
    original = module.TrainingArguments.__dict__["_setup_devices"]
    compute = original.func if hasattr(original, "func") else original.fget

    def _setup_devices(self: Any) -> torch.device:
        device: torch.device = compute(self)
        alone = str(getattr(getattr(self, "distributed_state", None), "distributed_type", "")).endswith("NO")
        if device.type == BACKEND and self._n_gpu == 1 and alone and not _trainers.depth:
            self._n_gpu = torch.get_device_module(BACKEND).device_count()
        return device

    _setup_devices.__doc__ = compute.__doc__
    replaced = type(original)(_setup_devices)
    if hasattr(replaced, "__set_name__"):
        replaced.__set_name__(module.TrainingArguments, "_setup_devices")
    module.TrainingArguments._setup_devices = replaced


def train_one_copy(module: ModuleType) -> None:
    """Let a Trainer count one device; `module` is `transformers.trainer`.

    It does so itself for a model on several devices. Others are copied to all CUDA devices (DataParallel), with several
    times the batch. Here that is left to a script's own `torch.nn.DataParallel`: what is tried out on simulated devices
    is one model on several devices, and its reference is the same model on one.
    """
    original = module.Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, model: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        # Those that the shim placed it takes care of.
        placed = hasattr(model, "modules") and placed_models.placed(model) is not None
        if args is not None and not placed and args.n_gpu > 1:
            copies, args._n_gpu = args.n_gpu, 1
            if len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2:
                log.once(
                    "info",
                    f"on {copies} CUDA devices the Trainer would train {copies} copies of this model "
                    f"(torch.nn.DataParallel), {copies} times the batch; simulated devices train one copy",
                )
        _trainers.depth += 1
        try:
            original(self, model, args, *more, **kwargs)
        finally:
            _trainers.depth -= 1

    module.Trainer.__init__ = __init__


class _Trainers(threading.local):
    depth = 0  # how many are being made in this thread


_trainers = _Trainers()
