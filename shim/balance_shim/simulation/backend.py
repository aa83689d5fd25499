"""The module that scripts see as `torch.npu`: the questions trainers ask a device, answered for a simulated one."""

import contextlib
import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch.types import Device

from ..device_spec import SimulationSpec
from ..timing.clock import Clock
from ..units import format_size
from ..virtual.machine import Machine
from . import generators, streams
from .tensor import BACKEND


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """The hooks by which torch's C++ side queries the backend as a whole."""

    def is_available(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, _: int) -> bool:
        return True


class Properties:
    """The result of `get_device_properties`: name, total_memory in bytes, compute capability (major, minor)."""

    def __init__(self, spec: SimulationSpec, index: int):
        kind, architecture = spec.kind(index), spec.architectures[index]
        self.name = kind.product if kind else f"simulated {format_size(spec.capacities[index])}"
        self.total_memory = spec.capacities[index]
        self.major, self.minor = architecture.capability or (0, 0)
        if architecture.runtime == "hip":
            self.gcnArchName = f"gfx{self.major}{self.minor}"
        self.multi_processor_count = 1

    def __repr__(self) -> str:
        return f"_SimulatedDeviceProperties(name='{self.name}', total_memory={format_size(self.total_memory)})"


def make_module(machine: Machine, spec: SimulationSpec, clock: Clock | None = None) -> types.ModuleType:
    """Return the backend's module, with the functions that `torch.cuda` has and trainers use."""
    module = types.ModuleType(f"torch.{BACKEND}", __doc__)
    ledger, index_of = machine.ledger, machine.index_of

    class device(contextlib.ContextDecorator):  # named as in every torch device module
        """Make a device the current one for the length of a `with` block; a negative index changes nothing."""

        def __init__(self, device: Device):
            self.idx = device if isinstance(device, int) else index_of(device)

        def __enter__(self) -> None:
            self.previous = machine.current
            if self.idx >= 0:
                machine.current = index_of(self.idx)

        def __exit__(self, *_: object) -> None:
            machine.current = self.previous

    class device_of(device):
        def __init__(self, obj: torch.Tensor):
            super().__init__(obj.device.index if obj.device.type == BACKEND else -1)

    def set_device(device: Device) -> None:
        machine.current = index_of(device)

    def mem_get_info(device: Device = None) -> tuple[int, int]:
        index = index_of(device)
        return ledger.free(index), ledger.capacities[index]

    def memory_allocated(device: Device = None) -> int:
        return ledger.live(index_of(device))

    def memory_reserved(device: Device = None) -> int:
        return ledger.reserved(index_of(device))

    def max_memory_allocated(device: Device = None) -> int:
        return ledger.peak(index_of(device))

    def max_memory_reserved(device: Device = None) -> int:
        return ledger.peak_reserved(index_of(device))

    def empty_cache() -> None:
        ledger.release_cached()

    def set_per_process_memory_fraction(fraction: float, device: Device = None) -> None:
        ledger.set_fraction(index_of(device), float(fraction))

    def reset_peak_memory_stats(device: Device = None) -> None:
        ledger.reset_peak(index_of(device))

    def memory_stats(device: Device = None) -> "OrderedDict[str, int]":
        index = index_of(device)
        live, peak = ledger.live(index), ledger.peak(index)
        sizes = {"active": (live, peak), "allocated": (live, peak), "requested": (live, peak)}
        sizes["reserved"] = ledger.reserved(index), ledger.peak_reserved(index)
        stats = OrderedDict(
            (f"{kind}_bytes.all.{when}", value)
            for kind, pair in sizes.items()
            for when, value in zip(("current", "peak"), pair, strict=True)
        )
        stats["num_alloc_retries"] = ledger.retries(index)
        return stats

    def memory_summary(device: Device = None, abbreviated: bool = False) -> str:
        return repr(ledger.usage()[index_of(device)])

    def get_device_properties(device: Device = None) -> Properties:
        return Properties(spec, index_of(device))

    def get_device_capability(device: Device = None) -> tuple[int, int] | None:
        return machine.architectures[index_of(device)].capability

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        # As torch.cuda answers for the current device: before 8.0 tensors of bfloat16 can be had, by emulation.
        runtime, capability = machine.architectures[machine.current]
        return including_emulation or runtime != "cuda" or capability is None or capability >= (8, 0)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    amp = types.SimpleNamespace(
        GradScaler=functools.partial(torch.amp.GradScaler, BACKEND),
        autocast=lambda enabled=True, dtype=torch.float16, cache_enabled=True: torch.autocast(
            BACKEND, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled
        ),
        autocast_mode=torch.amp.autocast_mode,
    )
    random_functions = generators.functions(machine)
    memory_functions = {
        "mem_get_info": mem_get_info, "memory_allocated": memory_allocated, "memory_reserved": memory_reserved,
        "max_memory_allocated": max_memory_allocated, "max_memory_reserved": max_memory_reserved,
        "memory_cached": memory_reserved, "max_memory_cached": max_memory_reserved, "memory_stats": memory_stats,
        "reset_peak_memory_stats": reset_peak_memory_stats, "reset_max_memory_allocated": reset_peak_memory_stats,
        "reset_accumulated_memory_stats": nothing, "empty_cache": empty_cache,
        "set_per_process_memory_fraction": set_per_process_memory_fraction, "memory_summary": memory_summary,
    }  # fmt: skip
    vars(module).update(
        **random_functions,
        **memory_functions,
        amp=amp,
        random=types.SimpleNamespace(**random_functions),
        memory=types.SimpleNamespace(**memory_functions),
        device=device,
        device_of=device_of,
        **vars(streams.make_classes(machine, clock)),
        default_generators=machine.generators.each,
        is_available=lambda: True,
        is_initialized=lambda: True,
        _initialized=True,  # torch's checkpointing asks this before it keeps the states of generators
        is_built=lambda: True,
        init=nothing,
        _lazy_init=nothing,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: len(machine.devices),
        current_device=lambda: machine.current,
        set_device=set_device,
        get_device_properties=get_device_properties,
        get_device_name=lambda device=None: get_device_properties(device).name,
        get_device_capability=get_device_capability,
        can_device_access_peer=lambda device, peer: True,
        ipc_collect=nothing,
        is_bf16_supported=is_bf16_supported,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_autocast_dtype=lambda: torch.get_autocast_dtype(BACKEND),
        set_compile_mode=nothing,
    )
    return module
