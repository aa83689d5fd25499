"""The bytes that live on each virtual device.

Storages are counted, not tensors: views share one. A storage is held from the first tensor seen on it until the last
one dies, which is when `weakref` reports it; caching and fragmentation of a real allocator are not modelled.
"""

import threading
import weakref
from collections import deque
from typing import NamedTuple

import torch

from balance_shim.units import format_size

GRANULE = 512  # what CUDA's caching allocator rounds every request up to


class DeviceUsage(NamedTuple):
    """What one virtual device holds and has held, in bytes."""

    name: str
    capacity: int
    live: int
    peak: int


class _Block(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that remembers what to give back when the storage dies."""

    __slots__ = ("index", "key", "size")
    key: int
    index: int
    size: int


class Ledger:
    """Live and peak bytes per device, with a cap.

    The death of a storage can be reported at any moment, also in the middle of our own bookkeeping; the report is
    therefore only queued (which is atomic), and settled before anything is read or added.
    """

    def __init__(self, names: tuple[str, ...], capacities: tuple[int, ...]):
        self.names = names
        self.capacities = capacities
        self._live = [0] * len(names)
        self._peak = [0] * len(names)
        self._others = [0] * len(names)
        self._unusable = [0] * len(names)
        self._blocks: dict[int, _Block] = {}
        self._dead: deque[_Block] = deque()
        self._lock = threading.Lock()  # transformers fills a model from several threads

    def hold(self, raw: torch.Tensor, index: int) -> None:
        """Count the storage of `raw` on device `index`, unless it already is.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; nothing is counted then.
        """
        storage = raw.untyped_storage()
        key = storage._cdata
        if self._dead:
            self._settle()
        if key in self._blocks:
            return
        size = _rounded(storage.nbytes())
        with self._lock:
            self._add(size, index)
            block = _Block(storage, self._dead.append)
            block.key, block.index, block.size = key, index, size
            self._blocks[key] = block

    def remeasure(self, raw: torch.Tensor) -> None:
        """Follow a storage whose length an operation has changed in place."""
        storage = raw.untyped_storage()
        self._settle()
        block = self._blocks.get(storage._cdata)
        if block is not None:
            size = _rounded(storage.nbytes())
            with self._lock:
                self._add(size - block.size, block.index)
                block.size = size

    def require(self, size: int, index: int) -> None:
        """Raise `torch.OutOfMemoryError` if `size` more bytes do not fit: called before the host pays for them."""
        self._settle()
        self._check(_rounded(size), index)

    def live(self, index: int) -> int:
        self._settle()
        return self._live[index]

    def peak(self, index: int) -> int:
        return self._peak[index]

    def reset_peak(self, index: int) -> None:
        self._settle()
        self._peak[index] = self._live[index]

    def occupy(self, index: int, others: int | None = None, unusable: int | None = None) -> None:
        """Take room on device `index` that no tensor of this process has: by other processes, or by fragmentation.

        Args:
            others: bytes that other processes use from now on.
            unusable: bytes that the allocator has reserved from now on and cannot use; None leaves each as it is.
        """
        if others is not None:
            self._others[index] = others
        if unusable is not None:
            self._unusable[index] = unusable

    def reserved(self, index: int) -> int:
        """Return the bytes that the allocator of this process has: live ones, and those it cannot use."""
        return self.live(index) + self._unusable[index]

    def free(self, index: int) -> int:
        return max(0, self.capacities[index] - self.reserved(index) - self._others[index])

    def usage(self) -> tuple[DeviceUsage, ...]:
        self._settle()
        return tuple(map(DeviceUsage, self.names, self.capacities, self._live, self._peak))

    def _settle(self) -> None:
        while self._dead:
            with self._lock:
                try:
                    block = self._dead.popleft()
                except IndexError:  # another thread was faster
                    return
                self._live[block.index] -= block.size
                if self._blocks.get(block.key) is block:
                    del self._blocks[block.key]

    def _add(self, size: int, index: int) -> None:
        self._check(size, index)
        self._live[index] += size
        if self._live[index] > self._peak[index]:
            self._peak[index] = self._live[index]

    def _check(self, size: int, index: int) -> None:
        free = max(0, self.capacities[index] - self._live[index] - self._others[index] - self._unusable[index])
        if size > free:
            # The words " out of memory." are what accelerate and others look for before they try a smaller batch.
            raise torch.OutOfMemoryError(
                f"Simulated device out of memory. Tried to allocate {format_size(size)}. {self.names[index]} has a "
                f"total capacity of {format_size(self.capacities[index])} of which {format_size(free)} is free. "
                f"{format_size(self._live[index])} is in use by tensors of this process."
            )


def _rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE
