"""The blocks of the caching allocator's model, and the pools that hold the free ones in order."""

from bisect import bisect_left, insort


class Block:
    """A part of a segment. `address` and `size` in bytes; `mapped` is False for addresses without memory."""

    __slots__ = ("address", "allocated", "born", "mapped", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: "Pool", mapped: bool = True) -> None:
        self.address, self.size, self.pool, self.mapped = address, size, pool, mapped
        self.allocated = False
        self.born = 0  # the pool's count of searches when it was last freed, for garbage collection
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def is_segment(self) -> bool:
        """Whether the block is all of its segment."""
        return self.prev is None and self.next is None

    @property
    def expandable_size(self) -> int:
        """Bytes of the block and of the addresses behind it that have no memory yet."""
        behind = self.next
        return self.size + (behind.size if behind is not None and not behind.mapped else 0)


class Pool:
    """The free blocks of a size class, and, with expandable segments, the addresses that have no memory."""

    __slots__ = ("free", "page", "searches", "small", "unmapped")

    def __init__(self, small: bool, page: int) -> None:
        self.small, self.page = small, page
        self.free: list[tuple[int, int, Block]] = []  # by size, then address
        self.unmapped: list[tuple[int, Block]] = []  # by address
        self.searches = 0

    def add(self, block: Block) -> None:
        block.born = self.searches
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]
