"""A device as plans see it: its capacity, overhead and rules. `devices` returns those of this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cache import folder_of
from .device_rules.kinds import DEFAULT_ARCHITECTURE, Architecture, Capability, DeviceKind, Runtime
from .device_rules.overhead import overhead_of
from .settings import Settings
from .timing.measured import rates_for
from .timing.rates import DeviceRates
from .units import MIB, format_size

GRANULE = 64 * MIB  # capacities are rounded down to it
ALIKE = 0.01  # of a capacity: devices that differ by less are taken for equal


@dataclass(frozen=True)
class Device:
    """One accelerator. Sizes in bytes.

    Attributes:
        index: the integer that a device map holds.
        name: as torch writes it, "cuda:1".
        available: bytes that could be allocated on it now, after the user's caps.
        capacity: bytes that a plan may fill: `available` less the reserve.
        overhead: bytes that the runtime will take besides tensors (context, workspaces) and has not taken yet.
        capability: the compute capability, as torch gives it; None for a kind of device that has none.
        runtime: whose rules it follows: "cuda" or "hip" behind `torch.cuda`, else its type.
        kind: its name in the table of kinds; "" for one that is not in it.
        rates: in FLOP/s and bytes/s; None where unknown.
        loadable: bytes free while a model loads, where another one has yet to leave; None: `available`.
    """

    index: int
    name: str
    available: int
    capacity: int
    overhead: int = 0
    capability: Capability | None = None
    runtime: Runtime = "cuda"
    loadable: int | None = None
    kind: str = ""
    rates: DeviceRates | None = None

    @property
    def architecture(self) -> Architecture:
        """The facts that decide which kernels run on it."""
        return Architecture(self.runtime, self.capability)

    @property
    def holds_weights(self) -> int:
        """The bytes of weights that can be loaded."""
        return self.available if self.loadable is None else min(self.available, self.loadable)


def describe(
    index: int,
    name: str,
    available: int,
    settings: Settings,
    architecture: Architecture = DEFAULT_ARCHITECTURE,
    kind: DeviceKind | None = None,
    product: str = "",
) -> Device:
    """Return the `Device` with `available` bytes, less the reserve that the settings ask for.

    Args:
        product: as the driver names it; "": as it names devices of this kind.
    """
    # Nothing is taken besides tensors on simulated devices, which follow CUDA's rules in all else.
    has_runtime = name.startswith("cuda")
    overhead = overhead_of(architecture) if has_runtime else 0
    capacity = max(1, available - settings.reserve.of(available, has_runtime))
    return Device(
        index,
        name,
        available,
        capacity,
        overhead,
        architecture.capability,
        architecture.runtime,
        kind="" if kind is None else kind.name,
        rates=rates_for(product or (kind.product if kind else ""), kind, folder_of(settings.cache)),
    )


def table(devices: tuple[Device, ...]) -> str:
    """Return "4 x 24.0 GiB" or "2 x 80.0 GiB + 2 x 24.0 GiB" for people to read."""
    runs: list[list[Any]] = []
    for device in devices:
        size = format_size(device.available)
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return " + ".join(f"{number} x {size}" for number, size in runs)


def levelled(devices: list[Device]) -> tuple[Device, ...]:
    """Return the devices with capacities rounded down, and those that differ by `ALIKE` at most made equal.

    Devices of one type differ by a few MiB, by the memory that a desktop or another process holds, and from run to
    run. Neither must change a map: with it, the dropout masks change, too.
    """
    equal = alike({device.index: device.capacity for device in devices})
    capacities = {index: max(1, size // _granule(size) * _granule(size)) for index, size in equal.items()}
    return tuple(replace(device, capacity=capacities[device.index]) for device in devices)


def alike(sizes: Mapping[int, int]) -> dict[int, int]:
    """Return the sizes, those that differ by `ALIKE` at most as the smallest of them."""
    equal: dict[int, int] = {}
    smallest = 0
    for index in sorted(sizes, key=sizes.__getitem__):
        if not smallest or sizes[index] > smallest * (1 + ALIKE):
            smallest = sizes[index]
        equal[index] = smallest
    return {index: equal[index] for index in sizes}


def _granule(capacity: int) -> int:
    """Return the unit that a capacity is rounded to: `GRANULE`, or on small devices a power of two under 0.4 %."""
    return min(GRANULE, 1 << max(0, (capacity // 256).bit_length() - 1))
