"""A model of PyTorch's caching allocator on one device and one stream: how much it reserves for what is allocated.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.5 to 2.13). Memory comes from the device in segments,
which are split into blocks. A block that is freed merges with free neighbours and stays with the process. The smallest
free block that is large enough serves a request; only where there is none a new segment is taken. There are no
addresses but numbers that grow, so that the order of blocks in a segment is known.
"""

from bisect import bisect_left

from .allocator_blocks import Block, Pool
from .allocator_settings import CUDA, DEFAULT, AllocatorSettings, Geometry

_SPAN = 9 / 8  # of the device's memory that a range of expandable segments covers
_NO_LIMIT = 1 << 62


class NoRoom(Exception):
    """The device has no segment for a request, not even after all cached ones went back."""


class CachingAllocator:
    """The allocator of one device.

    Attributes:
        limit: bytes that it may have from the device; may change at any time.
        reserved: bytes that it has from the device now; `peak_reserved` the most so far.
        allocated: bytes in blocks that are in use. More than was requested where a block was not split.
        retries: how often cached segments were given back because the device had no more.
    """

    def __init__(
        self,
        limit: int = _NO_LIMIT,
        settings: AllocatorSettings = DEFAULT,
        geometry: Geometry = CUDA,
    ) -> None:
        self.limit = limit
        self.settings, self.geometry = settings, geometry
        self.reserved = self.peak_reserved = self.allocated = self.retries = 0
        self.fraction_set = settings.memory_fraction is not None
        self._small = Pool(True, geometry.small_segment)
        self._large = Pool(False, geometry.large_segment)
        self._span = int(min(limit, _NO_LIMIT // 2) * _SPAN)
        self._next_address = 0
        self._never_split = settings.max_split_size if settings.max_split_size is not None else _NO_LIMIT
        self._granule = geometry.granule

    def allocate(self, size: int) -> Block:
        """Return a block of at least `size` bytes, which has to be positive.

        Raises:
            NoRoom: the device has not enough left; cached segments have gone back to it.
        """
        granule = self._granule
        size = -(-size // granule) * granule
        if self.settings.roundup_power2_divisions:
            size = self._rounded_to_division(size)
        pool = self._small if size <= self.geometry.small else self._large
        block = self._cached(pool, size) or self._from_device(pool, size)
        rest = block.size - size
        if rest and self._splits(pool, size, rest):
            self._split(block, size)
        block.allocated = True
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Take `block` back into the cache."""
        block.allocated = False
        self.allocated -= block.size
        block.pool.add(self._merged_with_neighbours(block))

    def release_cached(self) -> None:
        """Give free memory back to the device, as `empty_cache` does: whole segments, or whole pages of a range."""
        for pool in (self._large, self._small):
            for _, _, block in tuple(pool.free):
                if self.settings.expandable_segments:
                    self._unmap(block)
                elif block.is_segment:
                    self._release(block)

    def reset_peak(self) -> None:
        self.peak_reserved = self.reserved

    def blocks(self) -> list[Block]:
        """Return the free blocks, by pool; for checks."""
        return [block for pool in (self._small, self._large) for _, _, block in pool.free]

    def _rounded_to_division(self, size: int) -> int:
        divisions = self.settings.divisions(size)
        if divisions <= 1 or size <= self._granule * divisions or size & (size - 1) == 0:
            return size
        step = (1 << (size.bit_length() - 1)) >> (divisions.bit_length() - 1)
        return -(-size // step) * step

    def _cached(self, pool: Pool, size: int) -> Block | None:
        """Return the free block that serves a request best, taken out of the pool; None if there is none."""
        free = pool.free
        pool.searches += 1
        position = bisect_left(free, (size,))
        if position == len(free):
            return None
        block = free[position][2]
        if self.settings.expandable_segments:
            # A block at the end of a range counts with what it could grow by, so that it is left alone where others do.
            while position + 1 < len(free) and free[position + 1][2].expandable_size < block.expandable_size:
                position += 1
                block = free[position][2]
        if size < self._never_split <= block.size:
            return None
        if size >= self._never_split and block.size >= size + self.settings.max_non_split_rounding:
            return None
        del free[position]
        return block

    def _from_device(self, pool: Pool, size: int) -> Block:
        if self.fraction_set and self.settings.garbage_collection_threshold:
            self._collect_garbage()
        block = self._grow(pool, size)
        if block is None and self._release_oversized(pool, size):
            block = self._grow(pool, size)
        if block is None:
            self.retries += 1
            self.release_cached()
            block = self._grow(pool, size)
        if block is None:
            raise NoRoom
        return block

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """Return a new block that holds `size` bytes, in no pool yet; None if the device has no room."""
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        segment = self.geometry.segment(size)
        if not self._take(segment):
            return None
        block = Block(self._next_address, segment, pool)
        self._next_address += segment
        return block

    def _take(self, size: int) -> bool:
        if self.reserved + size > self.limit:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def _splits(self, pool: Pool, size: int, rest: int) -> bool:
        if pool.small or self.settings.expandable_segments:
            return rest >= self._granule
        return size < self._never_split and rest > self.geometry.small

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.pool)
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next, block.size = rest, size
        block.pool.add(rest)

    def _merged_with_neighbours(self, block: Block) -> Block:
        """Return `block`, which is in no list, with its free neighbours of the same kind merged into it."""
        before, behind = block.prev, block.next
        mapped = block.mapped
        if before is not None and not before.allocated and before.mapped == mapped:
            self._forget(before)
            block.address, block.size, block.prev = before.address, block.size + before.size, before.prev
            if block.prev is not None:
                block.prev.next = block
        if behind is not None and not behind.allocated and behind.mapped == mapped:
            self._forget(behind)
            block.size, block.next = block.size + behind.size, behind.next
            if block.next is not None:
                block.next.prev = block
        return block

    def _forget(self, block: Block) -> None:
        if block.mapped:
            block.pool.remove(block)
        else:
            block.pool.remove_unmapped(block)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self.reserved -= block.size

    def _release_oversized(self, pool: Pool, size: int) -> bool:
        """Give back blocks that are never split: one that is enough, else the largest. Return whether it sufficed."""
        if self.settings.max_split_size is None or self.settings.expandable_segments:
            return False
        least = max(size, self._never_split)
        free_segments = [block for _, _, block in pool.free if block.is_segment and block.size >= self._never_split]
        enough = next((block for block in free_segments if block.size >= least), None)
        if enough is not None:
            self._release(enough)
            return True
        total = 0
        while free_segments and total < least:
            total += free_segments[-1].size
            self._release(free_segments.pop())
        return total >= least

    def _collect_garbage(self) -> None:
        """Give back the whole segments of the large pool that went unused for longest, down to the threshold."""
        target = self.reserved - int(self.settings.garbage_collection_threshold * self.limit)
        pool = self._large
        while target > 0:
            idle = [block for _, _, block in pool.free if block.is_segment]
            ages = [pool.searches - block.born for block in idle]
            if not idle or not any(ages):
                return
            mean = sum(ages) / len(ages)
            for block, age in zip(idle, ages, strict=True):
                if age >= mean and target > 0:
                    target -= block.size
                    self._release(block)

    # Expandable segments: one range of addresses a pool, to which memory is mapped page by page.

    def _expand(self, pool: Pool, size: int) -> Block | None:
        block = self._room_in_range(pool, size)
        if not block.mapped:
            mapped = self._map(block, min(size, block.size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            assert block.next is not None, "the range was searched for this size"
            mapped = self._map(block.next, min(size - block.size, block.next.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _room_in_range(self, pool: Pool, size: int) -> Block:
        """Return the first block from which on `size` bytes of addresses are free, mapped or not."""
        for _, unmapped in pool.unmapped:
            first = unmapped.prev if unmapped.prev is not None and not unmapped.prev.allocated else unmapped
            room, block = 0, first
            while block is not None and not block.allocated and room < size:
                room += block.size
                block = block.next  # type: ignore[assignment]
            if room >= size:
                return first
        pages = -(-max(self._span, size) // pool.page)
        # Addresses are multiples of the page, so that the pages within a block follow from them.
        address = -(-self._next_address // pool.page) * pool.page
        block = Block(address, pages * pool.page, pool, mapped=False)
        self._next_address = address + block.size
        pool.add_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Give memory to the first pages of an unmapped block; return the free block they are part of."""
        pool = block.pool
        size = -(-size // pool.page) * pool.page  # unmapped blocks start and end with pages
        if not self._take(size):
            return None
        pool.remove_unmapped(block)
        if size < block.size:
            rest = Block(block.address + size, block.size - size, pool, mapped=False)
            rest.prev, rest.next = block, block.next
            if rest.next is not None:
                rest.next.prev = rest
            block.next, block.size = rest, size
            pool.add_unmapped(rest)
        block.mapped = True
        block = self._merged_with_neighbours(block)
        pool.add(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the memory of the whole pages in a free block back."""
        page, pool = block.pool.page, block.pool
        start, stop = -(-block.address // page) * page, (block.address + block.size) // page * page
        if stop <= start:
            return
        pool.remove(block)
        if start > block.address:
            self._split(block, start - block.address)
            pool.add(block)
            assert block.next is not None
            block = block.next
            pool.remove(block)
        if stop < block.address + block.size:
            self._split(block, stop - block.address)
        block.mapped = False
        self.reserved -= block.size
        pool.add_unmapped(self._merged_with_neighbours(block))
