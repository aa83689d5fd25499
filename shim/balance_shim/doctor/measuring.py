"""`balance-shim doctor --measure`: measure the rates of this machine's devices, in a few seconds."""

import time
from collections.abc import Callable
from typing import Any

from .. import cache, devices, settings, simulation
from ..timing.measured import Measured, write
from ..units import MIB
from .section import Section

SIDE = 8192  # of the matrices, less where they do not fit: large enough for the peak of today's devices
COPIED = 256 * MIB
REPEATS = 10
LAUNCHES = 2000
TITLE = "Measured rates"


def measure(read: settings.Settings) -> Section:
    """Measure each kind of device once and each pair of devices, and store the rates in the cache folder."""
    kind = devices.accelerator_type()
    if kind is None:
        return Section(TITLE, "  no accelerator: nothing to measure; plans use the table of device kinds")
    import torch

    module = torch.get_device_module(kind)
    firsts: dict[str, int] = {}
    for index in range(module.device_count()):
        firsts.setdefault(str(module.get_device_name(index)), index)
    measured = {product: _measured(module, torch.device(kind, index), kind) for product, index in firsts.items()}
    rows = [_row(product, rates) for product, rates in measured.items()]
    columns = [
        "device",
        "fp16 TFLOPS",
        "bf16 TFLOPS",
        "fp32 TFLOPS",
        "memory GB/s",
        "link GB/s",
        "host GB/s",
        "launch us",
    ]
    problems = []
    folder = cache.folder_of(read.cache)
    if folder is None:
        problems.append("the measured rates are not stored, because BALANCE_CACHE is off: set it to a folder")
    else:
        try:
            write(folder, measured)
        except OSError as error:
            problems.append(f"{folder}: the measured rates cannot be stored ({error.strerror}): set BALANCE_CACHE")
    return Section.of_table(TITLE, columns, rows, problems)


def _measured(module: Any, device: Any, kind: str) -> Measured:
    import torch

    rates = {name: _products(module, device, getattr(torch, name)) for name in ("float16", "bfloat16", "float32")}
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(source)
    memory = 2 * COPIED / _seconds(module, device, lambda: other.copy_(source))
    host = COPIED / _seconds(module, device, lambda: source.cpu(), repeats=3)
    pairs = [
        COPIED / _seconds(module, device, lambda target=target: source.to(target), (target,))  # type: ignore[misc]
        for target in (torch.device(kind, index) for index in range(module.device_count()))
        if target != device
    ]
    return Measured(
        **rates,
        memory=memory,
        host_bytes=host,
        link_bytes=min(pairs, default=0.0),
        launch=0.0 if simulation.is_active() else _launch(module, device),
    )


def _products(module: Any, device: Any, dtype: Any) -> float:
    """Return the FLOP/s of a matrix product; 0 for a type that the device cannot multiply in."""
    import torch

    free = module.mem_get_info(device)[0]
    side = SIDE
    while 4 * side * side * dtype.itemsize > free and side > 256:
        side //= 2
    try:
        left, right = (torch.ones((side, side), dtype=dtype, device=device) for _ in range(2))
        return 2 * side**3 / _seconds(module, device, lambda: left @ right)
    except RuntimeError:  # an out-of-memory error, or no such kernel
        return 0.0


def _seconds(
    module: Any,
    device: Any,
    operation: Callable[[], object],
    other_devices: tuple[Any, ...] = (),
    repeats: int = REPEATS,
) -> float:
    """Return the shortest time of an operation by the device's own events, after a first run that is not counted."""
    operation()
    times = []
    for _ in range(repeats):
        with module.device(device):
            start, end = (module.Event(enable_timing=True) for _ in range(2))
            for used_device in (device, *other_devices):
                module.synchronize(used_device)
            start.record()
            operation()
            end.record()
            for used_device in (device, *other_devices):
                module.synchronize(used_device)
        times.append(float(start.elapsed_time(end)) / 1e3)
    return max(min(times), 1e-9)


def _launch(module: Any, device: Any) -> float:
    """Return the seconds that the host takes to queue a small operation."""
    import torch

    number = torch.zeros(1, device=device)
    best = float("inf")
    for _ in range(3):
        module.synchronize(device)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            number.add_(1)
        best = min(best, time.perf_counter() - began)
    module.synchronize(device)
    return best / LAUNCHES


def _row(product: str, rates: Measured) -> list[str]:
    tera = [f"{rate / 1e12:.1f}" if rate else "-" for rate in (rates.float16, rates.bfloat16, rates.float32)]
    giga = [f"{rate / 1e9:.0f}" if rate else "-" for rate in (rates.memory, rates.link_bytes, rates.host_bytes)]
    return [product, *tera, *giga, f"{rates.launch * 1e6:.1f}" if rates.launch else "-"]
