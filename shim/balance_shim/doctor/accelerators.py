"""The devices, the room on them, and how fast they reach each other."""

import time
from typing import Any

from .. import devices
from ..report.table import table
from ..units import GIB, MIB, format_size
from .section import Section

COPIED = 256 * MIB
REPEATS = 5
SLOW = 0.25  # of the fastest link
FULL = 0.9  # of a device's memory free counts as empty


def inventory() -> Section:
    """Return the devices with their total and free memory."""
    kind = devices.accelerator_type()
    if kind is None:
        return Section("Devices", "  no accelerator")
    import torch

    module = torch.get_device_module(kind)
    rows, problems = [], []
    for index in range(module.device_count()):
        free, total = module.mem_get_info(index)
        rows.append([f"{kind}:{index}", _name(module, index), format_size(total), format_size(free)])
        if free < FULL * total:
            problems.append(
                f"{format_size(total - free)} of {kind}:{index} are in use by others: end them (nvidia-smi lists "
                "them), or leave the device out"
            )
    return Section("Devices", table(["device", "name", "total", "free"], rows, left=2), tuple(problems))


def links() -> Section | None:
    """Return the bandwidth from each device to each other, measured; None where there are not two. Takes seconds."""
    kind = devices.accelerator_type()
    if kind is None or devices.count() < 2:
        return None
    import torch

    module = torch.get_device_module(kind)
    names = [f"{kind}:{index}" for index in range(module.device_count())]
    speeds = {(a, b): _bandwidth(module, torch, a, b) for a in names for b in names if a != b}
    rows = [[a, *("-" if a == b else f"{speeds[a, b] / GIB:.1f}" for b in names)] for a in names]
    text = table(["GiB/s to", *names], rows)
    return Section("Links between devices", text, tuple(slow_links(speeds)))


def slow_links(speeds: dict[tuple[str, str], float]) -> list[str]:
    """Return a line on the pairs that are much slower than the fastest. `speeds`: (from, to) -> bytes a second."""
    best = max(speeds.values())
    slow = sorted({tuple(sorted(pair)) for pair, speed in speeds.items() if speed < SLOW * best})
    if not slow:
        return []
    pairs = ", ".join(f"{a} and {b}" for a, b in slow)
    return [
        f"{pairs} reach each other at less than {SLOW:.0%} of the fastest pair's speed: peer access may be off "
        "(nvidia-smi topo -p2p r), or they hang on different processors; ZeRO-3 waits for the slowest"
    ]


def _bandwidth(module: Any, torch: Any, source: str, target: str) -> float:
    """Return bytes a second of a copy from one device to another."""
    data = torch.empty(COPIED, dtype=torch.uint8, device=source)
    there = torch.empty_like(data, device=target)
    best = 0.0
    for _ in range(REPEATS):  # the first one sets up the way
        module.synchronize(source)
        module.synchronize(target)
        start = time.perf_counter()
        there.copy_(data)
        module.synchronize(source)
        module.synchronize(target)
        best = max(best, COPIED / max(time.perf_counter() - start, 1e-9))
    return best


def _name(module: Any, index: int) -> str:
    return str(module.get_device_name(index)) if hasattr(module, "get_device_name") else ""
