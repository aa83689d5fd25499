"""From which block each tensor of a trace comes: whoever meets two that cannot meet then knows whose they are."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...virtual.machine import Machine
from ..blocks import holder_of
from .errors import CannotTrace
from .machine import TracedTensor
from .run import wrap_forward
from .shared_inputs import Copy

_ORIGIN = "_origin"  # attribute of a traced tensor: the name of its block; inputs have none


class CrossesDevices(CannotTrace):
    """Operations met tensors of two devices.

    Attributes:
        met: for each such operation the names of the blocks that its tensors come from; None stands for the inputs, and
            for all that is made from nothing but them.
    """

    def __init__(self, message: str, met: tuple[frozenset[str | None], ...]) -> None:
        super().__init__(message)
        self.met = met


class Origins:
    """A dispatcher that records for a tensor which block made it, or, outside of blocks, the inputs of the operation.

    Operations that meet tensors of two devices are noted and go on with copies, so that one run finds them all.
    """

    def __init__(self, model: nn.Module, blocks: Collection[str], machine: Machine) -> None:
        """Mark all that is computed in this trace from now on.

        Args:
            model: the traced copy.
            blocks: the names of those that run, and of layers that other layers represent.
        """
        self._run: Callable[..., Any] = TracedTensor.run
        self._devices, self._ledger = machine.devices, machine.ledger
        self.copies: list[Copy] = []  # of the forward pass that is recorded
        self.began: dict[str, int] = {}  # block name -> the number of the recorded event ahead of which it was called
        self._running: list[str] = []
        self._met: dict[frozenset[str | None], str] = {}
        self._reached: set[str | None] = set()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            setattr(tensor, _ORIGIN, holder_of(name, blocks))
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in blocks:
            if name in modules:  # not so a tensor that hangs directly on a module
                wrap_forward(modules[name], partial(self._begins, name), self._ends)
        TracedTensor.run = self

    @property
    def reached(self) -> frozenset[str]:
        """The names of the blocks that ran, or whose tensors some operation took."""
        return frozenset(name for name in self._reached if name is not None)

    def check(self) -> None:
        """Say what has been noted so far.

        Raises:
            CrossesDevices: there was something.
        """
        if self._met:
            raise CrossesDevices(next(iter(self._met.values())), tuple(self._met))

    def _begins(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._running.append(name)
        self._reached.add(name)
        if name not in self.began and self._ledger.events is not None:
            self.began[name] = self._ledger.events
        return args, kwargs

    def _ends(self) -> None:
        self._running.pop()

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operation `func`."""
        self._reached.update(map(_origin, _tensors(args)))
        try:
            result = self._run(func, args, kwargs)
        except RuntimeError as error:
            tensors: Any = getattr(error, "tensors", None)  # those of `virtual.dispatch.mismatch`
            if tensors is None:
                raise
            if self._met and torch._C._current_graph_task_id() != -1:
                raise  # a backward pass through our own copies, which tells nothing new
            self._met.setdefault(frozenset(map(_origin, tensors)), str(error))
            place = self._devices[tensors[0].place]
            args, kwargs = tree_map_only(TracedTensor, lambda tensor: self._brought(tensor, place), (args, kwargs))
            result = self._run(func, args, kwargs)
        if func is torch.ops.aten._to_copy.default and torch._C._current_graph_task_id() == -1:
            self._note_copy(args[0], result)
        origin = self._running[-1] if self._running else next(filter(None, map(_origin, _tensors(args))), None)
        if origin is not None:
            for tensor in _tensors([result]):
                if _origin(tensor) is None:
                    setattr(tensor, _ORIGIN, origin)
        return result

    def _note_copy(self, source: Any, result: Any) -> None:
        traced = isinstance(source, TracedTensor) and isinstance(result, TracedTensor)
        if not traced or source.place == result.place or self._ledger.events is None:
            return
        number, recorded = self._ledger.allocation(source.raw)
        of_result = self._ledger.allocation(result.raw)[0]
        self.copies.append(Copy((source.place, number), recorded, result.place, of_result))

    def _brought(self, tensor: TracedTensor, device: torch.device) -> Any:
        if tensor.device == device:
            return tensor
        return self._run(torch.ops.aten._to_copy.default, (tensor,), {"device": device})


def _origin(tensor: Any) -> str | None:
    return getattr(tensor, _ORIGIN, None)


def _tensors(values: Any) -> Iterator[TracedTensor]:
    """Yield the traced tensors among `values`, and in lists among them."""
    for value in values:
        if isinstance(value, TracedTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
