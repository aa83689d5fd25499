"""The one accelerator that the check runs on: a real one, or a simulated one that shows that the script works."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from balance_shim.device import Device

LIMITLESS = 1 << 50  # bytes


@dataclass(frozen=True)
class Peaks:
    """The memory of the card over a stretch of work, in bytes.

    Attributes:
        allocated: the most that tensors held at once.
        reserved: the most that torch's allocator had taken from the device.
        outside: memory in use outside of the allocator when the stretch ends: context, kernels, other processes.
    """

    allocated: int
    reserved: int
    outside: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class Card:
    """Device 0 of the current accelerator.

    Raises:
        RuntimeError: there is no accelerator.
    """

    def __init__(self) -> None:
        if not torch.accelerator.is_available():
            raise RuntimeError("no accelerator; --simulate SIZE shows on a simulated one that the check works")
        self.kind: str = torch.accelerator.current_accelerator().type
        self.module: Any = torch.get_device_module(self.kind)
        self.device = torch.device(self.kind, 0)

    @property
    def is_simulated(self) -> bool:
        return "simulated" in self.module.get_device_properties(0).name.lower()

    def facts(self) -> dict[str, Any]:
        properties = self.module.get_device_properties(0)
        return {
            "device": properties.name,
            "kind": self.kind,
            "capability": list(self.module.get_device_capability(0)),
            "total_memory": self.module.mem_get_info(0)[1],
        }

    def as_planned(self, index: int, capacity: int) -> Device:
        """Return a device like this one, with `capacity` bytes for tensors and nothing in use."""
        runtime = "hip" if torch.version.hip else "cuda"
        capability = tuple(self.module.get_device_capability(0))
        return Device(index, f"{self.kind}:{index}", capacity, capacity, capability=capability, runtime=runtime)

    def synchronize(self) -> None:
        self.module.synchronize()

    def empty(self) -> None:
        """Give what nobody uses back to the device, so that the next measurement begins with an empty allocator."""
        gc.collect()
        self.module.empty_cache()

    def outside(self) -> int:
        """Return the bytes of the device that are neither free nor in torch's allocator."""
        free, total = self.module.mem_get_info(0)
        return int(total - free - self.module.memory_reserved(0))

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[Peaks]]:
        """Append the peaks of the body to the list that the context gives."""
        self.empty()
        self.module.reset_peak_memory_stats(0)
        peaks: list[Peaks] = []
        yield peaks
        self.synchronize()
        peaks.append(Peaks(self.module.max_memory_allocated(0), self.module.max_memory_reserved(0), self.outside()))

    @contextlib.contextmanager
    def filled(self, leaving: int) -> Iterator[None]:
        """Take all memory of the device but `leaving` bytes while the body runs."""
        self.empty()
        free, _ = self.module.mem_get_info(0)
        ballast = torch.empty(max(0, free - leaving), dtype=torch.uint8, device=self.device)
        try:
            yield
        finally:
            del ballast
            self.empty()

    def seconds(self, work: Any, repeats: int = 5) -> float:
        """Return the median time of one call of `work`, which is warmed up once."""
        times = []
        for number in range(repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            if number:
                times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]
