"""The model of the caching allocator: sequences worked out by hand from its rules, and what holds for any sequence."""

import itertools

import pytest
from hypothesis import given, settings, strategies

from balance_shim.units import GIB, KIB, MIB
from balance_shim.virtual import allocator_settings
from balance_shim.virtual.allocator import CachingAllocator, NoRoom
from balance_shim.virtual.allocator_settings import CUDA, AllocatorSettings, geometry_for

EXPANDABLE = AllocatorSettings(expandable_segments=True)
MODES = [AllocatorSettings(), EXPANDABLE, AllocatorSettings(max_split_size=32 * MIB)]


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 11 * MIB, 12 * MIB),
        (1025 * MIB, 1025 * MIB, 1026 * MIB),
    ],
)
def test_segments_have_cudas_sizes(size, block, segment):
    """2 MiB for requests up to 1 MiB, 20 MiB up to 10 MiB, then multiples of 2; no rest below 1 MiB is split off."""
    allocator = CachingAllocator()
    held = allocator.allocate(size)
    assert allocator.reserved == segment
    rest = segment - block
    assert held.size == (segment if segment > 2 * MIB and rest <= MIB else block) == allocator.allocated


def test_two_small_requests_share_a_segment_and_a_third_does_not_fit():
    """1 MiB + 1 MiB fill 2 MiB; the next 512 bytes take another segment."""
    allocator = CachingAllocator()
    for expected in (2, 2, 4):
        allocator.allocate(MIB if expected == 2 and allocator.allocated < 2 * MIB else 512)
        assert allocator.reserved == expected * MIB


def test_the_smallest_block_that_is_large_enough_is_taken():
    """Of free blocks of 30, 12 and 20 MiB a request of 11 MiB takes that of 12."""
    allocator = CachingAllocator()
    held = {size: allocator.allocate(size * MIB) for size in (30, 12, 20)}
    for block in held.values():
        allocator.free(block)
    block = allocator.allocate(11 * MIB)
    assert block.address == held[12].address and allocator.reserved == 62 * MIB


def test_a_large_block_that_a_smaller_request_split_costs_a_new_segment():
    """The gradient of a head: 1 GiB freed, 8 MiB put into it, and the next 1 GiB needs a segment of its own."""
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(GIB))
    small = allocator.allocate(8 * MIB)
    assert allocator.reserved == GIB
    allocator.allocate(GIB)
    assert allocator.reserved == 2 * GIB
    allocator.release_cached()  # the split segment cannot go back
    assert allocator.reserved == 2 * GIB
    allocator.free(small)
    allocator.release_cached()
    assert allocator.reserved == GIB


def test_expandable_segments_grow_instead():
    """The same in one range: what is missing behind the free part is mapped in pages of 20 MiB, nothing more."""
    allocator = CachingAllocator(80 * GIB, EXPANDABLE)
    allocator.free(allocator.allocate(GIB))
    pages = -(-GIB // (20 * MIB)) * 20 * MIB
    assert allocator.reserved == pages
    small = allocator.allocate(8 * MIB)
    allocator.allocate(GIB)
    assert allocator.reserved == -(-(GIB + 8 * MIB) // (20 * MIB)) * 20 * MIB
    allocator.free(small)
    allocator.release_cached()  # 8 MiB are less than a page
    assert allocator.reserved == -(-(GIB + 8 * MIB) // (20 * MIB)) * 20 * MIB


def test_whole_pages_of_a_range_go_back():
    """Of 100 MiB between two blocks in use the pages that lie inside are unmapped, and can be mapped again."""
    allocator = CachingAllocator(80 * GIB, EXPANDABLE)
    blocks = [allocator.allocate(size * MIB) for size in (10, 100, 10)]
    assert allocator.reserved == 120 * MIB
    allocator.free(blocks[1])
    allocator.release_cached()
    assert allocator.reserved == 40 * MIB  # 10..110 MiB holds the pages 20..100
    again = allocator.allocate(100 * MIB)
    assert allocator.reserved == 120 * MIB and again.address == blocks[0].address + 10 * MIB


def test_cached_segments_go_back_before_there_is_no_room():
    """With 100 MiB, a cached segment of 60 makes way for one of 80; with a split one there is no room."""
    allocator = CachingAllocator(100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    held = allocator.allocate(80 * MIB)
    assert allocator.reserved == 80 * MIB and allocator.retries == 1
    allocator.free(held)
    allocator.allocate(40 * MIB)
    with pytest.raises(NoRoom):
        allocator.allocate(60 * MIB)
    assert allocator.reserved == 80 * MIB and allocator.allocated == 40 * MIB


def test_blocks_from_max_split_size_on_are_left_whole():
    """A request below it does not take them, one above takes them if they are not much larger."""
    allocator = CachingAllocator(settings=AllocatorSettings(max_split_size=32 * MIB))
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(16 * MIB)
    assert allocator.reserved == 80 * MIB
    assert allocator.allocate(50 * MIB).size == 64 * MIB and allocator.reserved == 80 * MIB


def test_garbage_collection_gives_back_what_was_idle_for_longest():
    """Above half of the memory allowed, the segment unused for longer goes before a new one is taken."""
    chosen = AllocatorSettings(garbage_collection_threshold=0.5, memory_fraction=1.0)
    allocator = CachingAllocator(200 * MIB, chosen)
    old, young = allocator.allocate(50 * MIB), allocator.allocate(60 * MIB)
    allocator.free(old)
    for _ in range(3):
        allocator.free(allocator.allocate(MIB))
        allocator.allocate(11 * MIB)
    allocator.free(young)
    before = allocator.reserved
    allocator.allocate(80 * MIB)
    assert allocator.reserved < before + 80 * MIB and allocator.retries == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", EXPANDABLE),
        ("backend:native, expandable_segments:True,unheard_of:[1:2,3:4]", EXPANDABLE),
        ("max_split_size_mb:128,garbage_collection_threshold:0.6",
         AllocatorSettings(max_split_size=128 * MIB, garbage_collection_threshold=0.6)),
        ("roundup_power2_divisions:4", AllocatorSettings(roundup_power2_divisions=((0, 4),))),
        ("max_split_size_mb:many", AllocatorSettings()),
    ],
)  # fmt: skip
def test_settings_are_read(text, expected):
    """Under both names of the variable; what is unknown or wrong is passed over."""
    for name in allocator_settings.VARIABLES:
        assert allocator_settings.read({name: text}) == expected
    assert allocator_settings.is_set({"PYTORCH_CUDA_ALLOC_CONF": text}) == bool(text)


def test_rounding_to_parts_of_powers_of_two():
    """1200 KiB with 4 divisions is 1280 KiB (torch's own example); other bounds have other divisions."""
    allocator = CachingAllocator(settings=allocator_settings.read({"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:4"}))
    assert allocator.allocate(1200 * KIB).size == 1280 * KIB
    chosen = allocator_settings.read({"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2,>:8]"})
    assert [chosen.divisions(size * MIB) for size in (1, 300, 600, 5000)] == [1, 1, 2, 8]


@pytest.mark.parametrize("capacity", [MIB, 5 * MIB, 64 * MIB, GIB])
def test_small_simulated_devices_have_small_segments(capacity):
    """A segment is no larger a part of the device than 20 MiB of 2 GiB; real devices have the real sizes."""
    geometry = geometry_for(capacity)
    assert geometry.large_segment <= capacity / 50 and geometry.small >= geometry.granule
    assert geometry_for(2 * GIB) == geometry_for(80 * GIB) == CUDA


SIZES = strategies.one_of(
    strategies.integers(1, 4096), strategies.integers(1, 3 * MIB), strategies.integers(MIB, 90 * MIB)
)


@pytest.mark.parametrize("chosen", MODES)
@settings(deadline=None, max_examples=60)
@given(data=strategies.data())
def test_any_sequence_keeps_the_books(chosen, data):
    """Blocks in use never overlap, reserved is never below allocated, and all goes back when everything is freed."""
    allocator = CachingAllocator(512 * MIB, chosen)
    held = []
    for _ in range(data.draw(strategies.integers(0, 60))):
        action = data.draw(strategies.integers(0, 9))
        if action == 9:
            allocator.release_cached()
        elif action >= 6 and held:
            allocator.free(held.pop(data.draw(strategies.integers(0, len(held) - 1))))
        else:
            size = data.draw(SIZES)
            try:
                block = allocator.allocate(size)
            except NoRoom:
                continue
            assert block.size >= size
            held.append(block)
        used = sorted((block.address, block.address + block.size) for block in held)
        free = sorted((block.address, block.address + block.size) for block in allocator.blocks())
        for (_, stop), (start, _) in itertools.pairwise(sorted(used + free)):
            assert stop <= start
        assert sum(stop - start for start, stop in used) == allocator.allocated <= allocator.reserved
        assert sum(stop - start for start, stop in used + free) == allocator.reserved <= allocator.peak_reserved
        assert allocator.reserved <= allocator.limit
    for block in held:
        allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved == allocator.allocated == 0 and not allocator.blocks()
