"""The bytes that live on each virtual device, and those that a caching allocator reserves for them.

Storages are counted, not tensors: views share one. A storage is held from the first tensor seen on it until the last
one dies, which is when `weakref` reports it.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..units import format_size
from . import allocator_settings
from .allocator import CachingAllocator, NoRoom
from .allocator_blocks import Block

GRANULE = 512  # CUDA's caching allocator rounds every request up to a multiple of it


class DeviceUsage(NamedTuple):
    """The memory of one virtual device, in bytes, now and at its peak: in tensors, and reserved by the allocator."""

    name: str
    capacity: int
    live: int
    peak: int
    reserved: int = 0
    peak_reserved: int = 0


class _Held(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that remembers which memory to give back when the storage dies."""

    __slots__ = ("block", "index", "key", "number", "size")
    key: int
    index: int
    size: int
    block: Block | None  # the allocator's
    number: int  # of the allocation in the record of its device


class Ledger:
    """Live, peak and reserved bytes per device, with a cap.

    The death of a storage can be reported at any moment, also in the middle of our own bookkeeping; the report is
    therefore only queued (which is atomic), and settled before anything is read or added.
    """

    def __init__(self, names: tuple[str, ...], capacities: tuple[int, ...], caches: bool = True):
        """`caches`: whether devices have a caching allocator; without one what is reserved is what is live."""
        self.names = names
        self.capacities = capacities
        self._live = [0] * len(names)
        self._peak = [0] * len(names)
        self._others = [0] * len(names)
        self._fractions = [1.0] * len(names)
        self._storages: dict[int, _Held] = {}
        self._dead: deque[_Held] = deque()
        self._lock = threading.Lock()  # transformers fills a model from several threads
        self._record: list[tuple[int, int, int]] | None = None
        self._clock: Callable[[], int] = int
        self._numbers = [0] * len(names)
        self._allocators: tuple[CachingAllocator, ...] = ()
        settings = allocator_settings.read()
        if caches and settings.caches:
            if settings.memory_fraction is not None:
                self._fractions = [settings.memory_fraction] * len(names)
            self._allocators = tuple(
                CachingAllocator(size, settings, allocator_settings.geometry_for(size)) for size in capacities
            )
            for index in range(len(names)):
                self._set_limit(index)

    def hold(self, raw: torch.Tensor, index: int) -> None:
        """Count the storage of `raw` on device `index`, unless it already is.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; nothing is counted then.
        """
        storage = raw.untyped_storage()
        key = storage._cdata
        if self._dead:
            self._settle()
        if key in self._storages:
            return
        size = _rounded(storage.nbytes())
        with self._lock:
            block, number = self._add(size, index)
            # Only now: one whose tensor found no room must not report its death.
            held = _Held(storage, self._dead.append)
            held.key, held.index, held.size, held.block, held.number = key, index, size, block, number
            self._storages[key] = held

    def remeasure(self, raw: torch.Tensor) -> None:
        """Follow a storage whose length an operation has changed in place.

        Raises:
            torch.OutOfMemoryError: the device has no room for the new length.
        """
        storage = raw.untyped_storage()
        self._settle()
        held = self._storages.get(storage._cdata)
        size = _rounded(storage.nbytes())
        if held is not None and size != held.size:
            with self._lock:
                self._remove(held)
                held.size, held.number = 0, -1
                held.block, held.number = self._add(size, held.index)
                held.size = size

    def require(self, size: int, index: int) -> None:
        """Raise `torch.OutOfMemoryError` if `size` more bytes do not fit: called before the host pays for them."""
        self._settle()
        size = _rounded(size)
        with self._lock:
            block = self._allocate(size, index)
            if block is not None:  # what it took from the device serves the tensor that comes next
                self._allocators[index].free(block)

    def live(self, index: int) -> int:
        self._settle()
        return self._live[index]

    def peak(self, index: int) -> int:
        return self._peak[index]

    def reset_peak(self, index: int) -> None:
        self._settle()
        self._peak[index] = self._live[index]
        if self._allocators:
            self._allocators[index].reset_peak()

    def resize(self, capacities: tuple[int, ...]) -> None:
        """Let devices have these capacities from now on; for tests that try one model on many machines."""
        self.release_cached()
        self.capacities = capacities
        for index, size in enumerate(capacities[: len(self._allocators)]):
            self._allocators[index].geometry = allocator_settings.geometry_for(size)
            self._set_limit(index)

    def occupy(self, index: int, others: int) -> None:
        """Let other processes use `others` bytes of device `index` from now on."""
        self._others[index] = others
        self._set_limit(index)

    def set_fraction(self, index: int, fraction: float) -> None:
        """Let the allocator have no more than this part of device `index`."""
        self._fractions[index] = fraction
        if self._allocators:
            self._allocators[index].fraction_set = True
        self._set_limit(index)

    def release_cached(self) -> None:
        """Give the allocators' unused memory back to the devices."""
        self._settle()
        with self._lock:
            for allocator in self._allocators:
                allocator.release_cached()

    def reserved(self, index: int) -> int:
        """Return the bytes that the allocator of this process has from the device: live ones, and cached ones."""
        live = self.live(index)
        return self._allocators[index].reserved if self._allocators else live

    def peak_reserved(self, index: int) -> int:
        return self._allocators[index].peak_reserved if self._allocators else self._peak[index]

    def retries(self, index: int) -> int:
        """Return how often the allocator gave its cache back because the device had no more."""
        return self._allocators[index].retries if self._allocators else 0

    def free(self, index: int) -> int:
        return max(0, self.capacities[index] - self.reserved(index) - self._others[index])

    def usage(self) -> tuple[DeviceUsage, ...]:
        self._settle()
        return tuple(
            DeviceUsage(
                name,
                self.capacities[index],
                self._live[index],
                self._peak[index],
                self.reserved(index),
                self.peak_reserved(index),
            )
            for index, name in enumerate(self.names)
        )

    @contextmanager
    def recording(self, clock: Callable[[], int] = int) -> Iterator[list[tuple[int, int, int]]]:
        """Yield a list that fills with (device, event, time): allocations (bytes, from 0) and frees (-1 - number).

        Allocations are numbered from 0 in their order on the device, from the start of the record. Storages that lived
        before are not in it. `clock` tells the time; by default it is always 0.
        """
        self._settle()
        record: list[tuple[int, int, int]] = []
        self._record, self._numbers, self._clock = record, [0] * len(self.names), clock
        for held in self._storages.values():
            held.number = -1
        try:
            yield record
        finally:
            self._record = None

    def allocation(self, raw: torch.Tensor) -> tuple[int, bool]:
        """Return the number that the allocation of `raw` has in the record, and True; else one of its storage."""
        key = raw.untyped_storage()._cdata
        held = self._storages.get(key)
        return (held.number, True) if held is not None and held.number >= 0 else (key, False)

    @property
    def events(self) -> int | None:
        """The number of events recorded so far; None without a record."""
        return None if self._record is None else len(self._record)

    def settle(self) -> None:
        """Subtract the storages that have died. Only the cut of a record needs this; each allocation does it anyway."""
        self._settle()

    def _settle(self) -> None:
        while self._dead:
            with self._lock:
                try:
                    held = self._dead.popleft()
                except IndexError:  # another thread was faster
                    return
                self._remove(held)
                if self._storages.get(held.key) is held:
                    del self._storages[held.key]

    def _add(self, size: int, index: int) -> tuple[Block | None, int]:
        """Count `size` bytes on a device; return the allocator's block and the number of the allocation."""
        block = self._allocate(size, index)
        number = -1
        if self._record is not None:
            number = self._numbers[index]
            self._numbers[index] += 1
            self._record.append((index, size, self._clock()))
        self._live[index] += size
        if self._live[index] > self._peak[index]:
            self._peak[index] = self._live[index]
        return block, number

    def _remove(self, held: _Held) -> None:
        self._live[held.index] -= held.size
        if held.block is not None:
            self._allocators[held.index].free(held.block)
            held.block = None
        if self._record is not None and held.number >= 0:
            self._record.append((held.index, -1 - held.number, self._clock()))

    def _allocate(self, size: int, index: int) -> Block | None:
        """Return the allocator's block for `size` bytes; None where there is no allocator, or nothing to allocate.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        if not self._allocators:
            if self._live[index] + size > self.capacities[index] - self._others[index]:
                raise self._out_of_memory(size, index, self._live[index])
            return None
        if not size:
            return None
        allocator = self._allocators[index]
        try:
            return allocator.allocate(size)
        except NoRoom:
            raise self._out_of_memory(size, index, allocator.reserved) from None

    def _out_of_memory(self, size: int, index: int, reserved: int) -> torch.OutOfMemoryError:
        capacity, live = self.capacities[index], self._live[index]
        free = max(0, capacity - reserved - self._others[index])
        # The words " out of memory." are what accelerate and others look for before they try a smaller batch. The rest
        # is as CUDA has it.
        return torch.OutOfMemoryError(
            f"Simulated device out of memory. Tried to allocate {format_size(size)}. {self.names[index]} has a total "
            f"capacity of {format_size(capacity)} of which {format_size(free)} is free. This process has "
            f"{format_size(reserved)} memory in use. Of the allocated memory "
            f"{format_size(live)} is allocated by PyTorch, and {format_size(reserved - live)} is reserved by PyTorch "
            "but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
        )

    def _set_limit(self, index: int) -> None:
        if self._allocators:
            capacity = self.capacities[index]
            limit = min(capacity - self._others[index], int(self._fractions[index] * capacity))
            self._allocators[index].limit = max(0, limit)


def _rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE
