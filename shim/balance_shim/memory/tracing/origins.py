"""From which block each tensor of a trace comes: whoever meets two that cannot meet then knows whose they are."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from balance_shim.virtual.dispatch import DeviceMismatch

from ..blocks import holder_of
from .copy import CannotTrace
from .machine import TracedTensor

_ORIGIN = "_origin"  # attribute of a traced tensor: the name of its block; inputs have none


class CrossesDevices(CannotTrace):
    """An operation met tensors of two devices.

    Attributes:
        blocks: the names of the blocks that the two come from; None stands for the inputs, and for all that is made
            from nothing but them.
    """

    def __init__(self, message: str, blocks: frozenset[str | None]) -> None:
        super().__init__(message)
        self.blocks = blocks


def watch(model: nn.Module, blocks: Collection[str]) -> None:
    """Mark what is computed in this trace from now on, until it ends.

    Args:
        model: the traced copy.
        blocks: the names of those that run.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        setattr(tensor, _ORIGIN, holder_of(name, blocks))
    origins = _Origins(TracedTensor.run)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in blocks:
        if name in modules:  # not so a tensor that hangs directly on a module
            modules[name].register_forward_pre_hook(origins.begins(name))
            modules[name].register_forward_hook(origins.ends, always_call=True)
    TracedTensor.run = origins


class _Origins:
    """A dispatcher that says of each tensor which block made it, or made what it is made from outside of blocks."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._running: list[str] = []

    def begins(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.append(name)

    def ends(self, *_: Any) -> None:
        self._running.pop()

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operation `func`.

        Raises:
            CrossesDevices: its tensors are on different devices.
        """
        try:
            result = self._run(func, args, kwargs)
        except DeviceMismatch as error:
            raise CrossesDevices(str(error), frozenset(map(_origin, error.tensors))) from error
        origin = self._running[-1] if self._running else next(filter(None, map(_origin, _tensors(args))), None)
        if origin is not None:
            for each in _tensors([result]):
                if _origin(each) is None:
                    setattr(each, _ORIGIN, origin)
        return result


def _origin(tensor: Any) -> str | None:
    return getattr(tensor, _ORIGIN, None)


def _tensors(values: Any) -> Iterator[TracedTensor]:
    """Yield the traced tensors among `values`, and in lists among them."""
    for value in values:
        if isinstance(value, TracedTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
