"""A steady rise told from a jump and from noise."""

import random

import pytest

from balance_shim.monitoring.trend import SteadyRises, began

MIB = 1 << 20


def first_alarm(values, noises=None, least=100):
    rises = SteadyRises(least)
    for position, value in enumerate(values):
        rate = rises.add(value, noises[position] if noises else 0)
        if rate is not None:
            return position, rate
    return None


def test_a_rise_is_found_within_ten_values_with_its_rate():
    """What grows by 50 a value is found as soon as five parts of two values show it."""
    position, rate = first_alarm([1000 + 50 * number for number in range(20)])
    assert position == 9 and rate == pytest.approx(50)


def test_a_slow_rise_is_found_later():
    """What grows too slowly for ten values is found over a longer stretch."""
    position, rate = first_alarm([1000 + number for number in range(400)])
    assert 100 < position < 400 and rate == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "values",
    [
        [1000] * 400,
        [1000] * 5 + [9000] * 400,  # optimizer state that appears late
        [1000] * 7 + [5000] * 40 + [9000] * 400,  # and something once more
        [1000 + 50 * min(number, 6) for number in range(400)],  # a warm-up that ends
    ],
)
def test_levels_and_jumps_are_no_rise(values):
    """Memory that reaches another level stays quiet, however large the jump."""
    assert first_alarm(values) is None


def test_noise_with_a_known_reason_is_no_rise():
    """Where what is left follows the inputs that are still held, longer and longer batches are no leak."""
    rng = random.Random(0)
    for _ in range(200):
        noises = sorted(rng.randrange(2000) for _ in range(60))
        assert first_alarm([1000 + noise for noise in noises], noises) is None
    noises = [rng.randrange(200) for _ in range(300)]
    values = [1000 + 60 * number + noise for number, noise in enumerate(noises)]
    assert first_alarm(values, noises) is not None


def test_where_a_rise_began():
    """The position of the first value above the level, also under noise; the very first where it was never level."""
    rng = random.Random(1)
    for start in (3, 12, 40):
        values = [1000 + 100 * max(0, number - start + 1) + rng.randrange(20) for number in range(start + 20)]
        assert began(values) == pytest.approx(start, abs=1)
    assert began([100 * number for number in range(20)]) == 0
