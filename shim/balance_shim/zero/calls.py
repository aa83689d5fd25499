"""Calls of a model outside of the Trainer's steps: `if rank == 0: model(...)` or `model.generate(...)` by the script.

Such a call gathers weights, which all ranks have to do together. They meet first, so that a rank that is alone is told.
Inside of the Trainer's steps all ranks are known to be, and `watch.py` looks after them.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from . import meeting

if TYPE_CHECKING:
    from torch import nn

_watched: "WeakSet[Any]" = WeakSet()
_depth = 0  # of steps and calls that all ranks are known to be in


def watch(model: "nn.Module") -> None:
    """Have all ranks meet before each call of `model` by the script itself."""
    if model in _watched:
        return
    _watched.add(model)
    model.register_forward_pre_hook(_before_call, prepend=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Enclose a part that all ranks run, so that they need not meet for a call in it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    """Be around `model.generate`, to which all ranks come.

    transformers 4 has the ranks wait for each other before it calls the model, also where that is not partitioned.
    """
    if not _depth:
        meeting.meet(f"{type(model).__name__}.generate")
    with together():
        yield


def _before_call(module: Any, args: Any) -> None:
    del args
    if not _depth:
        meeting.meet(f"a call of {type(module).__name__}")
