"""Specifications of simulated machines, and their parser. Standard library only: imported while arming."""

from typing import NamedTuple

from .device_rules.kinds import DEFAULT_ARCHITECTURE, Architecture, DeviceKind, is_kind, kind_named
from .units import MIB, parse_size

MOST_DEVICES = 64  # torch numbers devices with a signed byte; nobody has a single node with more than this
FORMS = (
    'write devices x size or name, such as "4x24GiB", "2xA100-40GB+2xT4" or "4x20GiB@RTX4090", with ":shapes" at the '
    "end for shapes only"
)


class SimulationSpec(NamedTuple):
    """A simulated machine.

    Attributes:
        capacities: bytes of each device, in the order of their indices.
        shapes_only: whether floating-point tensors have shapes but no numbers, which makes large models affordable.
        kinds: the kind of each device, None for one given by its size alone; empty where all are.
    """

    capacities: tuple[int, ...]
    shapes_only: bool = False
    kinds: tuple[DeviceKind | None, ...] = ()

    def kind(self, index: int) -> DeviceKind | None:
        """Return the kind of device `index`; None for one given by its size alone."""
        return self.kinds[index] if self.kinds else None

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """The architecture of each device; `DEFAULT_ARCHITECTURE` of those given by their size alone."""
        kinds = map(self.kind, range(len(self.capacities)))
        return tuple(kind.architecture if kind else DEFAULT_ARCHITECTURE for kind in kinds)


def parse_spec(text: str) -> SimulationSpec:
    """Return the machine that `text` ("4x24GiB", "2xA100-40GB+2xT4", "4x20GiB@RTX4090", "8x80GiB:shapes") describes.

    Raises:
        ValueError: `text` describes no machine, or one with no devices or more than `MOST_DEVICES`.
    """
    machine, colon, suffix = text.strip().partition(":")
    if colon and suffix.strip().lower() != "shapes":
        raise ValueError(f"{text!r}: unknown suffix {suffix.strip()!r}; {FORMS}")
    capacities: list[int] = []
    kinds: list[DeviceKind | None] = []
    for group in machine.split("+"):
        number, device = _counted(group)
        if number is not None and not number.strip().isdecimal():
            raise ValueError(f"{text!r}: {number.strip()!r} is not a device count; {FORMS}")
        count = 1 if number is None else int(number)
        try:
            capacity, kind = _device(device)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}; {FORMS}") from None
        if capacity < MIB:  # "4" is a slip for "4x24GiB", not a device of four bytes
            raise ValueError(f"{text!r}: a device has at least 1 MiB; {FORMS}")
        if not 1 <= count <= MOST_DEVICES - len(capacities):
            raise ValueError(f"{text!r}: a machine has 1 to {MOST_DEVICES} devices; {FORMS}")
        capacities += [capacity] * count
        kinds += [kind] * count
    return SimulationSpec(tuple(capacities), bool(colon), tuple(kinds) if any(kinds) else ())


def _counted(group: str) -> tuple[str | None, str]:
    """Return the number of devices as it is written, None where there is none, and the device."""
    lowered = group.lower()
    if is_kind(group) or "x" not in lowered:  # RTX4090 and MI300X have an x of their own
        return None, group
    at = lowered.index("x")
    return group[:at], group[at + 1 :]


def _device(text: str) -> tuple[int, DeviceKind | None]:
    """Return the capacity in bytes and the kind that `text` ("24GiB", "RTX4090", "20GiB@RTX4090") stands for."""
    size, at, name = text.partition("@")
    if at:
        return parse_size(size.lower()), kind_named(name)
    bare = text.strip()
    if is_kind(bare) or bare[:1].isalpha():
        kind = kind_named(bare)
        return kind.memory, kind
    return parse_size(bare.lower()), None
