"""Rates of devices and of the host, as the clock takes them."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..device_rules.kinds import DeviceKind, Link, Rates

Precision = Literal["float16", "bfloat16", "float32"]


class Operation(NamedTuple):
    """The cost of one operation on a device.

    Attributes:
        flops: of its matrix products.
        moved: bytes of its inputs and outputs.
        precision: in which its matrix products are computed.
        launches: kernels that it starts; 0 for one that only makes a view.
    """

    flops: int = 0
    moved: int = 0
    precision: Precision = "float32"
    launches: int = 1


@dataclass(frozen=True)
class DeviceRates:
    """What one device does in a second; FLOPs and bytes.

    Attributes:
        measured: whether this machine was measured, or the figures are from the table of kinds.
    """

    float16: float
    bfloat16: float
    float32: float
    memory: float
    link: Link
    link_bytes: float
    host_bytes: float
    measured: bool = False

    def seconds(self, operation: Operation) -> float:
        """Return how long the device takes: the longer of computing and of moving bytes."""
        computing = operation.flops / getattr(self, operation.precision) if operation.flops else 0.0
        return max(computing, operation.moved / self.memory)

    def with_measured(self, **rates: float) -> "DeviceRates":
        """Return the rates with those that were measured in place of nominal ones."""
        return replace(self, measured=True, **rates) if rates else self  # type: ignore[arg-type]  # floats only


def rates_of(kind: DeviceKind | None) -> DeviceRates | None:
    """Return the rates in the table; None for a device of unknown kind."""
    return None if kind is None else DeviceRates(*_in_order(kind.rates))


def _in_order(rates: Rates) -> tuple[float, float, float, float, Link, float, float]:
    return (
        rates.float16, rates.bfloat16, rates.float32, rates.memory, rates.link, rates.link_bytes, rates.host_bytes
    )  # fmt: skip


@dataclass(frozen=True)
class HostRates:
    """What the host's Python and C++ side takes, in seconds.

    Attributes:
        launch: one kernel, from the call in Python to the driver's queue.
        view: an operation that starts no kernel.
        hook: accelerate's hooks around one block of a device map, forward.
        copy: the latency of a copy between devices, on the devices' side.
    """

    launch: float = 8e-6
    view: float = 3e-6
    hook: float = 150e-6
    copy: float = 10e-6
    measured: bool = False

    def seconds(self, operation: Operation) -> float:
        """Return how long the host takes to start the operation."""
        return operation.launches * self.launch if operation.launches else self.view
