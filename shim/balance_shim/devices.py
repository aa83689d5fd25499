"""The inventory: which accelerators this process may use, and how much memory each can give.

Works for any accelerator type that torch knows (cuda and ROCm, npu, xpu, a simulated one): only the device module's
common functions are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import log
from .placement.map_file import ACCELERATOR_TYPES
from .settings import Settings
from .units import MIB, format_size, parse_size

# What the runtime of an accelerator takes beside tensors once work begins, in bytes a device. The context is there by
# the time that free memory has been asked for. cuBLAS takes a workspace for each thread that works, which are two in
# training, of up to 32 MiB (compute capability 9.0, ATen's CUDABlas.cpp). Not measured on a device yet. What the
# allocator wastes is what BALANCE_RESERVE is for.
OVERHEAD = {"cuda": 64 * MIB}
LEAST_AVAILABLE = MIB  # nothing of a model that needs several devices fits below


@dataclass(frozen=True)
class Device:
    """One accelerator. Sizes in bytes.

    Attributes:
        index: the integer that a device map holds.
        name: as torch writes it, "cuda:1".
        available: what could be allocated on it now, after the user's caps.
        capacity: what a plan may fill: `available` less the reserve.
        overhead: what the runtime takes beside tensors (context, workspaces) and is not in use yet.
    """

    index: int
    name: str
    available: int
    capacity: int
    overhead: int = 0


def accelerator_type() -> str | None:
    """Return the type of accelerator in this process ("cuda", "npu", ...), or None on a machine without one."""
    import torch

    if hasattr(torch, "accelerator"):  # torch 2.6 on
        if not torch.accelerator.is_available():
            return None
        current = torch.accelerator.current_accelerator()
        return None if current is None or current.type in ("cpu", "mps") else current.type
    for kind in ACCELERATOR_TYPES:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return kind
    return None


def count() -> int:
    """Return the number of accelerators in this process; 0 on a machine without any."""
    kind = accelerator_type()
    return 0 if kind is None else _module(kind).device_count()


def inventory(
    settings: Settings, max_memory: Mapping[Any, Any] | None = None, ours: Mapping[int, int] | None = None
) -> tuple[Device, ...]:
    """Return the devices a map may use, in index order.

    There are none when the script's `max_memory` names none: it wants the host. Devices with next to no room are left
    out.

    Args:
        settings: caps (`BALANCE_MAX_MEMORY`) and reserve (`BALANCE_RESERVE`).
        max_memory: what the script passed to `from_pretrained`: as there, devices that it leaves out are not used.
            `BALANCE_MAX_MEMORY` is the later word for the devices that both name.
        ours: bytes on each device that are in use and count as available, because what holds them is to be placed.
    """
    kind = accelerator_type()
    if kind is None:
        return ()
    module = _module(kind)
    total = module.device_count()
    if max_memory and all(key in ("cpu", "disk") for key in max_memory):
        return ()
    script_caps = {_index(key): _size(cap) for key, cap in (max_memory or {}).items() if key not in ("cpu", "disk")}
    caps = settings.max_memory if isinstance(settings.max_memory, dict) else {}
    absent = sorted(index for index in caps if index >= total)
    if absent:
        log.once("warning", f"BALANCE_MAX_MEMORY names device {absent[0]}, but there are {total}; that cap is ignored")
    found = []
    for index in range(total):
        if script_caps and index not in script_caps and index not in caps:
            continue
        available = _available(module, index) + (ours or {}).get(index, 0)
        if isinstance(settings.max_memory, int):
            available = min(available, settings.max_memory)
        elif index in caps:
            available = min(available, caps[index])
        elif index in script_caps:
            available = min(available, script_caps[index])
        device = describe(index, f"{kind}:{index}", available, settings)
        # One that the runtime alone fills would hold something all the same, because nothing makes its fill any worse.
        if (
            device.available >= LEAST_AVAILABLE + device.overhead
        ):  # max_memory={0: 0} is accelerate's way to keep a device free
            found.append(device)
    return tuple(found)


def describe(index: int, name: str, available: int, settings: Settings) -> Device:
    """Return the `Device` with `available` bytes, less the reserve that the settings ask for."""
    overhead = OVERHEAD.get(name.partition(":")[0], 0)
    return Device(index, name, available, max(1, available - settings.reserve.of(available)), overhead)


def table(devices: tuple[Device, ...]) -> str:
    """Return "4 x 24.0 GiB" or "2 x 80.0 GiB + 2 x 24.0 GiB" for people to read."""
    runs: list[list[Any]] = []
    for device in devices:
        size = format_size(device.available)
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return " + ".join(f"{number} x {size}" for number, size in runs)


def _module(kind: str) -> Any:
    import torch

    return torch.get_device_module(kind)


def _available(module: Any, index: int) -> int:
    """Return free memory, plus what this process's allocator holds on the device without using it."""
    free, _ = module.mem_get_info(index)
    unused = 0
    if hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated"):
        unused = max(0, module.memory_reserved(index) - module.memory_allocated(index))
    return int(free + unused)


def _index(key: Any) -> int:
    return key if isinstance(key, int) else int(str(key).rpartition(":")[2])


def _size(cap: Any) -> int:
    return int(cap) if isinstance(cap, int | float) else parse_size(cap)
