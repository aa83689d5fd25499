"""Which device a block of a model has under a device map."""

from collections.abc import Mapping

from ..memory.blocks import Block, holder_of


def device_of(name: str, device_map: Mapping[str, int | str]) -> int | str | None:
    """Return the device of a module or tensor: that of the longest key at or above it; None if no key covers it."""
    holder = holder_of(name, device_map)
    return None if holder is None else device_map[holder]


def place_of(block: Block, device_map: Mapping[str, int | str]) -> int | str:
    """Return the device of a block's first tensor: a map may go deeper than blocks; without one it is on the host."""
    place = device_of(block.tensors[0], device_map)
    return "cpu" if place is None else place
