"""A reading of a device's memory from its allocator and its driver, without synchronizing the device.

Only functions that all device modules of torch have are used: cuda (and ROCm), npu, xpu, and simulated devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .other_processes import busy_share, outside_allocator


class Reading(NamedTuple):
    """One device at the end of a step. Bytes.

    Attributes:
        allocated: in tensors now.
        reserved: what the allocator of this process has from the device, used or not.
        peak: the most in tensors at one time since the peaks were reset.
        others: what neither is free nor ours: other processes, and what cannot be told from them (see `Meter.exact`).
            None where it was not asked for.
    """

    allocated: int
    reserved: int
    peak: int
    others: int | None = None


class Meter:
    """Reads some of the devices of one type.

    Attributes:
        names: as torch writes them, "cuda:1".
        totals: bytes that each device has.
        paged: bytes of this process on each device, by index, that torch's allocator does not count and whose library
            pages them; to be kept up to date by whoever knows of them.
        exact: whether what this process has outside of torch's allocator is known; else an allowance is made for it.
    """

    def __init__(self, kind: str, indices: Sequence[int]) -> None:
        import torch

        self._module: Any = torch.get_device_module(kind)
        self.kind = kind
        self.indices = tuple(indices)
        self.names = tuple(f"{kind}:{index}" for index in self.indices)
        self.totals = tuple(int(self._module.mem_get_info(index)[1]) for index in self.indices)
        self.paged: dict[int, int] = {}
        self.exact = True
        self._nested = hasattr(self._module, "memory_stats_as_nested_dict")

    def read(self, with_others: bool = True) -> tuple[Reading, ...]:
        """Return a reading of each device. Asking for `others` goes to the driver, which costs most of the time."""
        return tuple(
            self._read(index, total, with_others) for index, total in zip(self.indices, self.totals, strict=True)
        )

    def busy(self) -> dict[str, float]:
        """Return the share of the last moments in which each device computed, where its driver tells; 0 to 1."""
        shares = {name: busy_share(self.kind, index) for name, index in zip(self.names, self.indices, strict=True)}
        return {name: share for name, share in shares.items() if share is not None}

    def peaks(self) -> tuple[int, ...]:
        """Return the most bytes in tensors on each device since the peaks were reset."""
        return tuple(self._statistics(index)[2] for index in self.indices)

    def reset_peaks(self) -> None:
        for index in self.indices:
            self._module.reset_peak_memory_stats(index)

    def _read(self, index: int, total: int, with_others: bool) -> Reading:
        allocated, reserved, peak = self._statistics(index)
        others = None
        if with_others:
            foreign = total - int(self._module.mem_get_info(index)[0]) - reserved
            uncached, exact = outside_allocator(self.kind, index, reserved)
            self.exact = self.exact and exact
            # Whether the driver counts managed memory as this process's is not documented: the larger one is right.
            others = max(0, foreign - max(uncached, self.paged.get(index, 0)))
        return Reading(allocated, reserved, peak, others)

    def _statistics(self, index: int) -> tuple[int, int, int]:
        """Return (allocated, reserved, peak): one question instead of three, and unsorted where that can be had."""
        if self._nested:
            nested = self._module.memory_stats_as_nested_dict(index)
            if not nested:  # a device that this process has not touched yet
                return 0, 0, 0
            allocation, held = nested["allocated_bytes"]["all"], nested["reserved_bytes"]["all"]
            return allocation["current"], held["current"], allocation["peak"]
        flat = self._module.memory_stats(index)
        moments = (("allocated", "current"), ("reserved", "current"), ("allocated", "peak"))
        allocated, reserved, peak = (flat.get(f"{counter}_bytes.all.{when}", 0) for counter, when in moments)
        return allocated, reserved, peak
