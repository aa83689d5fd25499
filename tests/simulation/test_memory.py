"""The ledger of bytes, on plain CPU tensors: it needs no simulated device."""

import threading

import pytest
import torch
from hypothesis import given, settings, strategies

from balance_shim.units import GIB, MIB
from balance_shim.virtual.ledger import GRANULE, Ledger


def ledger(*capacities):
    return Ledger(tuple(f"npu:{index}" for index in range(len(capacities))), capacities)


def test_a_storage_counts_once_and_until_its_last_tensor_dies():
    """Views of one storage add nothing, and each of them keeps it."""
    book, tensor = ledger(MIB), torch.ones(1000)
    view = tensor[10:20]
    book.hold(view, 0)
    book.hold(tensor, 0)
    assert book.live(0) == 4096
    del tensor
    assert book.live(0) == 4096
    del view
    assert book.live(0) == 0 and book.peak(0) == 4096


@pytest.mark.parametrize(("elements", "size"), [(0, 0), (1, GRANULE), (128, GRANULE), (129, 2 * GRANULE)])
def test_sizes_are_rounded_up(elements, size):
    """A request takes whole granules."""
    book, tensor = ledger(MIB), torch.ones(elements)
    book.hold(tensor, 0)
    assert book.live(0) == size


def test_what_does_not_fit_is_refused_and_not_counted():
    """The message has the device, the request, the capacity and what is free; the device is as before."""
    book, first, second = ledger(MIB, MIB), torch.empty(3 * MIB // 16), torch.empty(3 * MIB // 16)
    book.hold(first, 1)
    with pytest.raises(torch.OutOfMemoryError) as error:
        book.hold(second, 1)
    for phrase in ("npu:1", "Tried to allocate 768.0 KiB", "capacity of 1.0 MiB", "256.0 KiB is free"):
        assert phrase in str(error.value)
    with pytest.raises(torch.OutOfMemoryError):
        book.require(256 * 1024 + 1, 1)
    book.require(256 * 1024, 1)
    book.hold(second, 0)
    assert [device.live for device in book.usage()] == [3 * MIB // 4, 3 * MIB // 4]


def test_a_storage_that_grows_is_followed():
    """After resizing in place the new length counts, and all of it is given back."""
    book, tensor = ledger(MIB), torch.ones(128)
    book.hold(tensor, 0)
    tensor.resize_(1280)
    book.remeasure(tensor)
    assert book.live(0) == 5120
    del tensor
    assert book.live(0) == 0


def test_peaks_start_again_from_what_is_live():
    """Resetting forgets what has died, not what lives."""
    book, alive, dropped = ledger(MIB), torch.ones(128), torch.ones(1280)
    book.hold(alive, 0)
    book.hold(dropped, 0)
    del dropped
    assert book.peak(0) == 512 + 5120
    book.reset_peak(0)
    assert book.peak(0) == 512


@settings(deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(0, 2), strategies.integers(0, 3000)), max_size=40))
def test_any_sequence_adds_up(steps):
    """Holding and dropping in any order, live bytes are those of the living and the peak is the most there was."""
    book, living, peak = ledger(2**40, 2**40), [], [0, 0]
    for action, number in steps:
        if action == 2:
            if living:
                living.pop(number % len(living))
        else:
            tensor = torch.empty(number)
            book.hold(tensor, action)
            living.append((action, tensor, -(-number * 4 // GRANULE) * GRANULE))
            del tensor
        for index in (0, 1):
            expected = sum(size for place, _, size in living if place == index)
            peak[index] = max(peak[index], expected)
            assert (book.live(index), book.peak(index)) == (expected, peak[index])


def test_threads_may_use_it_at_once():
    """Nothing is lost or counted twice when several threads hold and drop."""
    book = ledger(2**40)

    def work():
        for number in range(2000):
            book.hold(torch.empty(number), 0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert book.live(0) == 0


def test_room_that_others_take():
    """It is neither free nor given to tensors, and comes back when they leave."""
    book, tensor = ledger(MIB, MIB), torch.empty(MIB // 8)  # half of a device
    book.occupy(0, others=3 * MIB // 4)
    assert book.free(0) == MIB // 4 and book.reserved(0) == book.live(0) == 0 and book.free(1) == MIB
    with pytest.raises(torch.OutOfMemoryError, match=r"256\.0 KiB is free"):
        book.hold(tensor, 0)
    book.occupy(0, others=0)
    book.hold(tensor, 0)
    assert book.free(0) == MIB // 2 == book.reserved(0)


def test_what_is_freed_stays_reserved_until_the_cache_is_emptied():
    """As on CUDA: reserved and its peak are of segments, and an allocated peak of nothing leaves them as they are."""
    book = ledger(4 * GIB)
    for size in (MIB, 12 * MIB):
        book.hold(torch.empty(size, dtype=torch.uint8), 0)  # dies at once
    assert book.live(0) == 0 and book.reserved(0) == 14 * MIB == book.peak_reserved(0)
    assert book.free(0) == 4 * GIB - 14 * MIB
    book.release_cached()
    assert book.reserved(0) == 0 and book.peak_reserved(0) == 14 * MIB
    book.reset_peak(0)
    assert book.peak_reserved(0) == 0


def test_fragments_run_a_device_out_of_memory():
    """Every second of many blocks freed is half of the device, and none of it serves a larger tensor."""
    book = ledger(256 * MIB)
    tensors = [torch.empty(10 * MIB, dtype=torch.uint8) for _ in range(25)]
    book.hold(torch.empty(250 * MIB, dtype=torch.uint8), 0)
    for tensor in tensors:
        book.hold(tensor, 0)  # parts of one segment
    del tensors[::2], tensor
    assert book.live(0) == 120 * MIB and book.reserved(0) == 250 * MIB
    book.hold(torch.empty(10 * MIB, dtype=torch.uint8), 0)
    with pytest.raises(torch.OutOfMemoryError) as error:
        book.hold(torch.empty(20 * MIB, dtype=torch.uint8), 0)
    assert "120.0 MiB is allocated by PyTorch, and 130.0 MiB is reserved by PyTorch but unallocated" in str(error.value)


def test_a_fraction_limits_the_allocator():
    """As `set_per_process_memory_fraction` does: what is free on the device is not all for this process."""
    book, allowed = ledger(4 * GIB), torch.empty(GIB, dtype=torch.uint8, device="meta")
    book.set_fraction(0, 0.25)
    book.hold(allowed, 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"3\.0 GiB is free"):
        book.hold(torch.empty(1, device="meta"), 0)


def test_a_record_can_be_replayed():
    """Allocations in order with their sizes, frees by number; what lived before the record is not in it."""
    book, old = ledger(GIB, GIB), torch.ones(1)
    book.hold(old, 0)
    with book.recording() as record:
        alive, dropped = torch.ones(1000), torch.ones(200)
        book.hold(alive, 0)
        book.hold(dropped, 0)
        book.hold(torch.ones(1), 1)
        del dropped, old
        book.settle()
    assert alive is not None
    assert [event for device, event, _ in record if device == 0] == [4096, 1024, -2]
    assert [event for device, event, _ in record if device == 1] == [512, -1]


def test_an_allocator_without_a_cache_reserves_what_is_live(monkeypatch):
    """As torch does with PYTORCH_NO_CUDA_MEMORY_CACHING, which is set whatever its value."""
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    book, alive = ledger(MIB), torch.ones(128)
    book.hold(alive, 0)
    book.hold(torch.ones(1280), 0)
    assert book.reserved(0) == book.live(0) == 512 and book.peak_reserved(0) == book.peak(0) == 512 + 5120
