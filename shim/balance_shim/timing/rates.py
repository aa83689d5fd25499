"""Rates of devices and of the host, as the clock takes them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..device_rules.kinds import DeviceKind, Link

Precision = Literal["float16", "bfloat16", "float32"]


Caller = Literal["python", "engine", "recomputing"]


class Operation(NamedTuple):
    """The cost of one operation on a device.

    Attributes:
        flops: of its matrix products.
        moved: bytes of its inputs and outputs.
        precision: in which its matrix products are computed.
        launches: kernels that it starts; 0 for one that only makes a view.
        caller: who starts it: the program, autograd's engine, or a checkpointed layer that runs again.
    """

    flops: int = 0
    moved: int = 0
    precision: Precision = "float32"
    launches: int = 1
    caller: Caller = "python"


@dataclass(frozen=True)
class DeviceRates:
    """The rates of one device of a machine: those of a kind (`Rates`, which is read without dataclasses), or measured.

    Attributes:
        measured: whether this machine was measured, or the figures are from the table of kinds.
        launch: seconds that the host was measured to take for a kernel; 0: unknown.
    """

    float16: float
    bfloat16: float
    float32: float
    memory: float
    link: Link
    link_bytes: float
    host_bytes: float
    measured: bool = False
    launch: float = 0.0

    def seconds(self, operation: Operation) -> float:
        """Return how long the device takes: the longer of computing and of moving bytes."""
        computing = operation.flops / getattr(self, operation.precision) if operation.flops else 0.0
        return max(computing, operation.moved / self.memory)


def rates_of(kind: DeviceKind | None) -> DeviceRates | None:
    """Return the rates in the table; None for a device of unknown kind."""
    return None if kind is None else DeviceRates(*kind.rates)


@dataclass(frozen=True)
class HostRates:
    """What the host's Python and C++ side takes, in seconds.

    The figures are such that a Llama layer takes what it takes on two cores with tiny tensors (`docs/measurements.md`):
    0.6 ms forward, 0.5 ms backward, 1.7 ms to be recomputed, which saved-tensor hooks slow down.

    Attributes:
        launch: one kernel, from the call in Python to the driver's queue.
        view: an operation that starts no kernel.
        engine: how much faster autograd's engine is than a program in Python.
        recomputing: how much slower a checkpointed layer is when it runs again.
        hook: accelerate's hook around one module of a model with a device map.
        copy: the latency of a copy between devices, on the devices' side.
    """

    launch: float = 11e-6
    view: float = 4e-6
    engine: float = 0.45
    recomputing: float = 2.9
    hook: float = 30e-6
    copy: float = 10e-6
    measured: bool = False

    def seconds(self, operation: Operation) -> float:
        """Return how long the host takes to start the operation."""
        seconds = operation.launches * self.launch if operation.launches else self.view
        if operation.caller == "python":
            return seconds
        return seconds * (self.engine if operation.caller == "engine" else self.recomputing)
