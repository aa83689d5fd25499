"""A machine that is not there: its devices, their memory, and which of them is current."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..device_rules.kinds import DEFAULT_ARCHITECTURE, Architecture
from .ledger import Ledger

if TYPE_CHECKING:
    from ..device_rules.attention import AttentionCall


class Watcher(Protocol):
    """Is told of everything that devices compute and copy, after it is done. Tensors are plain or meta."""

    def ran(
        self, func: torch._ops.OpOverload, args: Sequence[Any], out: Any, place: int | None, virtual: Sequence[Any]
    ) -> None:
        """An operation has returned `out` on device `place` (None: the host).

        Args:
            virtual: the virtual tensors among its arguments, which `args` has as they are inside.
        """

    def attended(self, place: int, query: Any, key: Any, value: Any, mask: Any, backward: bool) -> None:
        """A fused attention kernel has run on device `place`."""


class Machine:
    """Devices as torch knows them, all of one type, with the class of the tensors on them.

    Attributes:
        shapes_only: whether floating-point tensors have no numbers.
        separates_host: whether an operation may not mix tensors of the host with those of a device.
        architectures: of each device, which decides on its kernels.
        math_attention: the calls of attention so far that ran as plain matrix products.
        generators: the source of random operations on the devices (`simulation.generators.Generators`); None: from
            the generator of the host.
        watcher: is told of all operations; None: nobody is.
        ledger: counts bytes on the devices, with what a caching allocator reserves if the machine `caches`.
    """

    def __init__(
        self,
        kind: str,
        capacities: Sequence[int],
        tensor_class: type[torch.Tensor],
        shapes_only: bool = False,
        separates_host: bool = True,
        architectures: Sequence[Architecture] | None = None,
        alternatives: Sequence[Architecture] = (),
        caches: bool = True,
    ):
        """Make a machine with `capacities` bytes; `alternatives` stand for each device: see `architectures_at`."""
        self.kind = kind
        self.shapes_only = shapes_only
        self.separates_host = separates_host
        self.tensor_class = tensor_class
        self.architectures = tuple(architectures or (DEFAULT_ARCHITECTURE,) * len(capacities))
        self.math_attention: set[AttentionCall] = set()
        self._alternatives = tuple(alternatives)
        self.devices = tuple(torch.device(kind, index) for index in range(len(capacities)))
        self.ledger = Ledger(tuple(map(str, self.devices)), tuple(capacities), caches)
        self._of_thread = threading.local()
        self.generators: Any = None
        self.watcher: Watcher | None = None

    def architectures_at(self, place: int) -> tuple[Architecture, ...]:
        """Return the architectures that device `place` may have: several where it stands for any of several devices."""
        return self._alternatives or (self.architectures[place],)

    @property
    def current(self) -> int:
        """The index of the current device, which each thread has for itself, as with CUDA."""
        return getattr(self._of_thread, "current", 0)

    @current.setter
    def current(self, index: int) -> None:
        self._of_thread.current = index

    def index_of(self, device: "torch.device | str | int | None") -> int:
        """Return the index that `device` means here; no device or no index means the current one.

        Raises:
            RuntimeError: there is no such device, worded as CUDA does.
        """
        if device is None:
            return self.current
        if not isinstance(device, int):
            device = torch.device(device)
            if device.type != self.kind:
                raise ValueError(f"expected a device of type {self.kind}, got {device}")
            device = self.current if device.index is None else device.index
        if not 0 <= device < len(self.devices):
            raise RuntimeError(
                f"invalid device ordinal: {self.kind}:{device}; this simulated machine has {len(self.devices)} devices"
            )
        return device
