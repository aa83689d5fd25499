"""The inventory: which accelerators this process may use, and how much memory each can give.

Works for any accelerator type that torch knows (cuda and ROCm, npu, xpu, a simulated one): only the device module's
common functions are used.
"""

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from . import log
from .device import Device, alike, describe, levelled
from .device_rules.kinds import Architecture, DeviceKind, kind_of_product
from .eligible_devices import describe_display_cards, display_cards, eligible, total_memory
from .map_file import ACCELERATOR_TYPES
from .settings import Settings
from .units import MIB, format_size, parse_size

LEAST_AVAILABLE = MIB  # nothing of a model that needs several devices fits below


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
    settings: Settings,
    max_memory: Mapping[Any, Any] | None = None,
    ours: Mapping[int, int] | None = None,
    only: Collection[int] | None = None,
    leaving: Mapping[int, int] | None = None,
) -> tuple[Device, ...]:
    """Return the devices a map may use, in index order.

    There are none when the script's `max_memory` names none: it wants the host. Devices with next to no room are left
    out and, with a line, those that cannot be asked (full, in exclusive use, broken). Capacities that hardly differ
    are made equal, see `device.levelled`.

    Args:
        settings: caps (`BALANCE_MAX_MEMORY`) and reserve (`BALANCE_RESERVE`).
        max_memory: the script's argument of `from_pretrained`: as there, devices that it leaves out are not used.
            `BALANCE_MAX_MEMORY` is the later word for the devices that both name.
        ours: bytes on each device that are in use and count as available, because their owner is to be placed.
        only: the indices that matter; other devices are not queried, which would make a context on them.
        leaving: bytes on each device that are in use and count as available, but only once weights have been loaded.
    """
    kind = accelerator_type()
    if kind is None:
        return ()
    module = _module(kind)
    if max_memory and all(key in ("cpu", "disk") for key in max_memory):
        return ()
    if not hasattr(module, "mem_get_info"):  # torch.xpu before 2.6
        log.once(
            "warning",
            f"this torch cannot tell free memory on {kind} devices (newer ones can), so no map is planned; "
            "the library places the model",
        )
        return ()
    caps, script_caps = _caps(settings, max_memory, module.device_count())
    usable, full = [], []
    for index in eligible(module, kind, settings, caps, script_caps):
        if only is not None and index not in only:
            continue
        try:
            free = _available(module, index) + (ours or {}).get(index, 0)
            architecture = _architecture(module, kind, index)
        except Exception as error:  # accelerate, too, goes on with the other devices
            first_line = str(error).strip().partition("\n")[0] or type(error).__name__
            log.once("warning", f"{kind}:{index} is not used, because querying its memory failed: {first_line}")
            continue
        going = (leaving or {}).get(index, 0)
        available = free + going
        if isinstance(settings.max_memory, int):
            available = min(available, settings.max_memory)
        else:
            available = min(available, caps.get(index, script_caps.get(index, available)))
        device = describe(index, f"{kind}:{index}", available, settings, architecture, *_kind(module, index))
        if going:
            device = replace(device, loadable=free)
        # One that the runtime alone fills would hold something all the same, because nothing makes its fill any worse.
        if device.available >= LEAST_AVAILABLE + device.overhead:
            usable.append(device)
        else:
            full.append(device)
    if full and len(usable) < 2:  # otherwise the table of the plan shows which are used
        names = ", ".join(f"{device.name} ({format_size(device.available)})" for device in full)
        log.once("info", f"not used, because too little memory is free there or allowed by max_memory: {names}")
    return levelled(usable)


def without_display_cards(
    usable: tuple[Device, ...], settings: Settings, max_memory: Mapping[Any, Any] | None = None
) -> tuple[tuple[Device, ...], str]:
    """Return the devices that are no display cards, and a description of those that are, "" if there are none.

    A device that the script or the user names stays.
    """
    kind = accelerator_type()
    if kind is None or len(usable) < 2:
        return usable, ""
    module = _module(kind)
    caps, script_caps = _caps(settings, max_memory, module.device_count())
    small = display_cards(module, [device.index for device in usable], {*caps, *script_caps})
    return (
        tuple(device for device in usable if device.index not in small),
        describe_display_cards(module, kind, small),
    )


def computing(settings: Settings) -> tuple[int, ...]:
    """Return the indices of the devices that a training is likely to use, without asking any for its memory."""
    kind = accelerator_type()
    if kind is None:
        return ()
    module = _module(kind)
    caps, _ = _caps(settings, None, module.device_count())
    indices = eligible(module, kind, settings, caps, {})
    small = display_cards(module, indices, caps)
    return tuple(index for index in indices if index not in small)


def totals(settings: Settings) -> dict[int, int]:
    """Return the memory of each device that a training is likely to use: index -> bytes, free or not.

    No device is asked how much is free. Devices that differ by `device.ALIKE` at most are equal.
    """
    kind = accelerator_type()
    if kind is None:
        return {}
    module = _module(kind)
    caps, _ = _caps(settings, None, module.device_count())
    most = settings.max_memory if isinstance(settings.max_memory, int) else None
    sizes = {}
    for index in computing(settings):
        total = total_memory(module, index)
        if total is not None:
            sizes[index] = min(size for size in (total, caps.get(index), most) if size is not None)
    return alike(sizes)


def in_use(kind: str) -> tuple[int, ...]:
    """Return the devices on which this process has a context already, so that asking them makes none.

    All of them where torch cannot tell.
    """
    import torch

    indices = range(_module(kind).device_count())
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None) if kind == "cuda" else None
    return tuple(index for index in indices if has_context is None or has_context(index))


def _caps(
    settings: Settings, max_memory: Mapping[Any, Any] | None, total: int
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the caps of single devices: of `BALANCE_MAX_MEMORY`, and of the script's `max_memory`."""
    script_caps = {_index(key): _size(cap) for key, cap in (max_memory or {}).items() if key not in ("cpu", "disk")}
    caps = settings.max_memory if isinstance(settings.max_memory, dict) else {}
    absent = sorted(index for index in caps if index >= total)
    if absent:
        log.once("warning", f"BALANCE_MAX_MEMORY names device {absent[0]}, but there are {total}; that cap is ignored")
    return caps, script_caps


def _module(kind: str) -> Any:
    import torch

    return torch.get_device_module(kind)


def _architecture(module: Any, kind: str, index: int) -> Architecture:
    """Return the facts that decide which kernels run on a device; a simulated one answers as the real one."""
    ask = getattr(module, "get_device_capability", None)
    capability = ask(index) if ask is not None else None
    if not isinstance(capability, tuple):  # torch.npu gives None, torch.xpu a dict
        return Architecture(kind if kind in ("cuda", "npu", "xpu") else "other", None)  # type: ignore[arg-type]
    # NVIDIA's properties have the product's name there.
    gfx = str(getattr(module.get_device_properties(index), "gcnArchName", ""))
    return Architecture("hip" if gfx.startswith("gfx") else "cuda", (int(capability[0]), int(capability[1])))


def _kind(module: Any, index: int) -> tuple[DeviceKind | None, str]:
    """Return the kind of a device, None for one that is not in the table, and the name that its driver gives it."""
    with contextlib.suppress(Exception):  # a name is worth no failure
        product = str(module.get_device_name(index))
        return kind_of_product(product), product
    return None, ""


def _available(module: Any, index: int) -> int:
    """Return free memory, plus unused memory that this process's allocator holds on the device.

    No more than `torch.cuda.set_per_process_memory_fraction` leaves, also where PYTORCH_ALLOC_CONF sets it.
    """
    free, total = module.mem_get_info(index)
    unused = allocated = 0
    if hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated"):
        allocated = module.memory_allocated(index)
        unused = max(0, module.memory_reserved(index) - allocated)
    available = int(free + unused)
    fraction = _memory_fraction(module, index)
    return available if fraction >= 1 else max(0, min(available, int(fraction * total) - allocated))


def _memory_fraction(module: Any, index: int) -> float:
    """Return the part of a device's memory that this process may reserve."""
    with contextlib.suppress(Exception):  # torch 2.8 on; torch_npu has had a name that leads nowhere
        return float(module.get_per_process_memory_fraction(index))
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        written = re.search(r"per_process_memory_fraction:([\d.]+)", os.environ.get(variable, ""))
        if written:
            return float(written[1])
    return 1.0


def _index(key: Any) -> int:
    return key if isinstance(key, int) else int(str(key).rpartition(":")[2])


def _size(cap: Any) -> int:
    return int(cap) if isinstance(cap, int | float) else parse_size(cap)
