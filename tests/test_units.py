"""Sizes as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance_shim.units import GIB, MIB, counted, format_alike, format_size, gib, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * GIB), ("20 gib", 20 * GIB), ("20G", 20 * GIB), ("1.5GB", 1_500_000_000), ("8e9", 8_000_000_000)],
)
def test_sizes_are_read(text, size):
    """Binary and decimal units, with or without a space."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "x", "-3", "0", "nan", "inf", "20GiBB", "1e400", "5 ells", "--", "1,5GiB"])
def test_what_is_no_size_is_refused(text):
    """Anything but a positive finite amount."""
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(1, 2**62))
def test_formatted_sizes_read_back_to_within_their_precision(size):
    """format_size keeps one digit behind the point."""
    assert abs(parse_size(format_size(size)) - size) <= max(1, size * 0.06)


def test_table_columns_show_three_digits_of_the_largest_figure():
    """A column of small devices is not shown as zeros."""
    assert gib(24.04 * GIB, 80 * GIB) == "24.0"
    assert gib(2.345 * GIB, 3 * GIB) == "2.35" or gib(2.345 * GIB, 3 * GIB) == "2.34"
    assert gib(GIB / 8, GIB / 2) == "0.125"


def test_sizes_in_one_comparison_have_one_unit():
    """That of the largest, with as many digits as the smallest needs to be seen."""
    assert format_alike(900 * MIB, 24 * GIB) == ("0.88 GiB", "24.00 GiB")
    assert format_alike(6.5 * GIB, 3.4 * GIB) == ("6.5 GiB", "3.4 GiB")
    assert format_alike(8 * MIB, 0, 24 * GIB) == ("0.008 GiB", "0.000 GiB", "24.000 GiB")
    assert format_alike(3, 500) == ("3 B", "500 B") and format_alike(0) == ("0 B",)


def test_nouns_agree_with_their_number():
    """One block, several blocks, one process, several processes."""
    assert [counted(number, "block") for number in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]
    assert [counted(number, "process") for number in (1, 2)] == ["1 process", "2 processes"]
