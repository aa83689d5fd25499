"""What a simulated machine looks like, and how people write it down. Standard library only: read while arming."""

from typing import NamedTuple

from balance_shim.units import MIB, parse_size

MOST_DEVICES = 64  # torch numbers devices with a signed byte; nobody has a single node with more than this
FORMS = 'write devices x size, such as "4x24GiB" or "2x80GiB+2x24GiB", with ":shapes" at the end for shapes only'


class SimulationSpec(NamedTuple):
    """A simulated machine.

    Attributes:
        capacities: bytes of each device, in the order of their indices.
        shapes_only: whether floating-point tensors have shapes but no numbers, which makes large models affordable.
    """

    capacities: tuple[int, ...]
    shapes_only: bool = False


def parse_spec(text: str) -> SimulationSpec:
    """Return the machine that `text` ("4x24GiB", "2x80GiB+2x24GiB", "8x80GiB:shapes") describes.

    Raises:
        ValueError: `text` describes no machine, or one with no devices or more than `MOST_DEVICES`.
    """
    machine, colon, suffix = text.strip().partition(":")
    if colon and suffix.strip().lower() != "shapes":
        raise ValueError(f"{text!r}: unknown suffix {suffix.strip()!r}; {FORMS}")
    capacities: list[int] = []
    for group in machine.split("+"):
        number, times, size = group.lower().rpartition("x")
        if times and not number.strip().isdecimal():
            raise ValueError(f"{text!r}: {number.strip()!r} is no number of devices; {FORMS}")
        count = int(number) if times else 1
        try:
            capacity = parse_size(size)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}; {FORMS}") from None
        if capacity < MIB:  # "4" is a slip for "4x24GiB", not a device of four bytes
            raise ValueError(f"{text!r}: a device has at least 1 MiB; {FORMS}")
        if not 1 <= count <= MOST_DEVICES - len(capacities):
            raise ValueError(f"{text!r}: a machine has 1 to {MOST_DEVICES} devices; {FORMS}")
        capacities += [capacity] * count
    return SimulationSpec(tuple(capacities), bool(colon))
