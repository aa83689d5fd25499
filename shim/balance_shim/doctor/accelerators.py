"""The devices: free memory, and whether and how fast copies between them arrive.

A device or a pair that cannot be queried is a problem by itself; the others are still reported.
"""

import time
from typing import Any

from .. import copies, devices
from ..eligible_devices import has_kernels, name_of
from ..monitoring.other_processes import outside_allocator
from ..units import GIB, MIB, format_size
from .section import Section

COPIED = 256 * MIB  # at most, and a quarter of the free memory
REPEATS = 5
SLOW = 0.25  # of the fastest link
FULL = 0.1  # of a device's memory in other processes is a problem

# Drivers' messages about a device that cannot be used -> the remedy.
_REMEDIES = {
    "out of memory": "its memory is full: end the processes that use it (nvidia-smi lists them)",
    "busy or unavailable": "another process uses it exclusively: end that process or exclusive mode (nvidia-smi -c 0)",
    "no kernel image": "this torch has no kernels for its architecture: install another build of torch",
}
_LEAVE_OUT = "leave it out (CUDA_VISIBLE_DEVICES), or reset it"


def inventory() -> Section:
    """Return the devices with their identity, total and free memory."""
    kind = devices.accelerator_type()
    if kind is None:
        return Section("Devices", "  no accelerator")
    import torch

    module = torch.get_device_module(kind)
    rows, problems = [], []
    for index in range(module.device_count()):
        row, problem = _device(module, kind, index)
        rows.append(row)
        problems += problem
    header = ["device", "name", "identity", "total", "free"]
    return Section.of_table("Devices", header, rows, problems, left=3)


def links() -> Section | None:
    """Return the bandwidth from each device to each other, measured; None where there are not two. Takes seconds.

    Each pair copies a pattern first: copies that arrive corrupted are problems.
    """
    kind = devices.accelerator_type()
    if kind is None or devices.count() < 2:
        return None
    import torch

    module = torch.get_device_module(kind)
    names = [f"{kind}:{index}" for index in range(module.device_count())]
    speeds: dict[tuple[str, str], float] = {}
    cells, problems = {}, []
    for source in names:
        for target in names:
            if source == target:
                continue
            try:
                if not copies.pattern_arrives(torch.device(source), torch.device(target)):
                    cells[source, target] = "WRONG"
                    problems.append(f"copies from {source} to {target} arrive corrupted: {copies.REMEDY}")
                    continue
                speeds[source, target] = _bandwidth(module, torch, source, target)
                cells[source, target] = f"{speeds[source, target] / GIB:.1f}"
            except Exception as error:
                cells[source, target] = "failed"
                problems.append(f"nothing can be copied from {source} to {target}: {_first_line(error)}")
    rows = [[a, *("-" if a == b else cells[a, b] for b in names)] for a in names]
    problems += slow_links(speeds)
    return Section.of_table("Links between devices", ["GiB/s to", *names], rows, problems)


def slow_links(speeds: dict[tuple[str, str], float]) -> list[str]:
    """Return a line on the pairs that are much slower than the fastest. `speeds`: (from, to) -> bytes/s."""
    best = max(speeds.values(), default=0)
    slow = sorted({tuple(sorted(pair)) for pair, speed in speeds.items() if speed < SLOW * best})
    if not slow:
        return []
    pairs = ", ".join(f"{a} and {b}" for a, b in slow)
    return [
        f"{pairs} reach each other at less than {SLOW:.0%} of the fastest pair's speed: peer access may be off "
        "(nvidia-smi topo -p2p r), or they are attached to different CPU sockets; ZeRO-3 waits for the slowest"
    ]


def _device(module: Any, kind: str, index: int) -> tuple[list[str], list[str]]:
    """Return (row, problems) of one device."""
    name = f"{kind}:{index}"
    row = [name, name_of(module, index), _identity(module, index)]
    problems = []
    if not has_kernels(module, index):
        problems.append(f"{name} ({row[1]}): this torch has no kernels for its architecture; maps leave it out")
    try:
        free, total = module.mem_get_info(index)
    except Exception as error:
        reason = _first_line(error)
        remedy = next((remedy for text, remedy in _REMEDIES.items() if text in reason.lower()), _LEAVE_OUT)
        return [*row, "?", "?"], [*problems, f"{name} cannot be used ({reason}): {remedy}"]
    uncached, _ = outside_allocator(kind, index, 0)
    used_elsewhere = total - free - uncached
    if used_elsewhere >= FULL * total:
        problems.append(
            f"other processes use {format_size(used_elsewhere)} of {name}: end them (nvidia-smi lists them), or "
            "exclude the device"
        )
    return [*row, format_size(total), format_size(free)], problems


def _bandwidth(module: Any, torch: Any, source: str, target: str) -> float:
    """Return the bytes/s of a copy from one device to another."""
    free = min(module.mem_get_info(torch.device(name).index)[0] for name in (source, target))
    size = max(MIB, min(COPIED, free // 4))
    data = torch.empty(size, dtype=torch.uint8, device=source)
    copy = torch.empty_like(data, device=target)
    best = 0.0
    for _ in range(REPEATS):  # the first one sets up the way
        module.synchronize(source)
        module.synchronize(target)
        start = time.perf_counter()
        copy.copy_(data)
        module.synchronize(source)
        module.synchronize(target)
        best = max(best, size / max(time.perf_counter() - start, 1e-9))
    return best


def _identity(module: Any, index: int) -> str:
    """Return the PCI address as nvidia-smi lists it, or the UUID: CUDA numbers devices in another order."""
    try:
        properties = module.get_device_properties(index)
    except Exception:
        return ""
    if hasattr(properties, "pci_bus_id"):
        domain, bus, slot = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
        return f"{domain:08X}:{bus:02X}:{slot:02X}.0"
    return str(getattr(properties, "uuid", ""))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
