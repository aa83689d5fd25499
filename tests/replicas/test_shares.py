"""How devices are divided among ranks."""

import random
from itertools import combinations, product

import pytest

from balance_shim.replicas.shares import divide

GIB = 2**30


def _divisions(devices, ranks):
    """Yield each way to divide `devices` into `ranks` shares that are not empty, by trying all of them."""
    for owners in product(range(ranks), repeat=len(devices)):
        shares = [
            [device for device, owner in zip(devices, owners, strict=True) if owner == rank] for rank in range(ranks)
        ]
        if all(shares):
            yield shares


def _sums(shares, capacities):
    return sorted(sum(capacities[device] for device in share) for share in shares)


def _mixes():
    """Each number of devices of three sizes, up to six devices, with each number of ranks; larger ones at random."""
    sizes = (16, 24, 40)
    for counts in product(range(7), repeat=3):
        if 1 <= sum(counts) <= 6:
            mix = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
            for ranks in range(1, min(4, len(mix)) + 1):
                yield mix, ranks
    chance = random.Random(7)
    for total in (7, 8):
        for _ in range(12):
            yield [chance.choice((24, 48, 80)) for _ in range(total)], chance.randint(2, 3)


def test_the_weakest_share_is_as_large_as_brute_force_finds():
    """For all mixes of three sizes: the sums of the shares, smallest first, are the largest that there are."""
    chance = random.Random(1)
    for mix, ranks in _mixes():
        chance.shuffle(mix)
        capacities = {index: size * GIB for index, size in enumerate(mix)}
        shares = divide(capacities, ranks)
        assert sorted(device for share in shares for device in share) == list(capacities), (mix, ranks)
        assert all(shares), (mix, ranks)
        best = max(_sums(division, capacities) for division in _divisions(list(capacities), ranks))
        assert _sums(shares, capacities) == best, (mix, ranks)


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ([24] * 4, 2, ((0, 2), (1, 3))),
        ([24] * 8, 4, ((0, 4), (1, 5), (2, 6), (3, 7))),
        ([24] * 8, 3, ((0, 3, 6), (1, 4, 7), (2, 5))),
        ([24, 24, 48, 48], 2, ((0, 2), (1, 3))),
        ([48, 24, 24, 48], 2, ((0, 2), (1, 3))),
        ([24] * 4, 4, ((0,), (1,), (2,), (3,))),
    ],
)
def test_each_rank_has_the_device_of_its_number(sizes, ranks, expected):
    """Where memory allows it, as libraries put the inputs of local rank r on device r."""
    assert divide(dict(enumerate(sizes)), ranks) == expected


def test_a_rank_may_have_to_use_other_devices():
    """Memory comes first: two small devices make one share, the large one the other."""
    assert divide({0: 24, 1: 24, 2: 80}, 2) == ((0, 1), (2,))


def test_linked_devices_stay_together():
    """Pairs with a fast link are shares, whatever the numbers of the ranks; but not at the expense of memory."""
    pairs = [frozenset(pair) for pair in ((0, 1), (2, 3))]
    assert divide(dict.fromkeys(range(4), 24), 2, pairs) == ((0, 1), (2, 3))
    assert divide({0: 24, 1: 24, 2: 48, 3: 48}, 2, pairs) == ((0, 2), (1, 3))


def test_links_between_all_devices_decide_nothing():
    """A switch links all devices: then each rank has the device of its number."""
    everywhere = [frozenset(pair) for pair in combinations(range(8), 2)]
    assert divide(dict.fromkeys(range(8), 80), 4, everywhere) == divide(dict.fromkeys(range(8), 80), 4)


def test_devices_without_the_lowest_numbers():
    """Excluded devices leave gaps."""
    assert divide({1: 24, 3: 24, 4: 24, 7: 24}, 2) == ((1, 4), (3, 7))


def test_more_ranks_than_devices():
    """There is no share for each."""
    with pytest.raises(ValueError, match="2 devices for 3 ranks"):
        divide({0: 24, 1: 24}, 3)
