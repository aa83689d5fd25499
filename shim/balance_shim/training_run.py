"""The shim's objects of one `Trainer`: in one dictionary, ended together when its training ends.

Each subpackage declares the parts that it keeps. Other people's objects get no attributes of ours, with three
exceptions, where the reason is given: `training/micro_batch` and `training/precision` (the arguments' copies need them
too), and `zero/weights/inference_models` (a dictionary of engines would keep their models alive). Facts about a model,
which may be placed before a Trainer exists and be trained by several, are in weak dictionaries by model.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Generic, TypeVar
from weakref import finalize

from .patching.guard import attempt

_T = TypeVar("_T")
# By the identity of a trainer, which goes with it: a script's own class may compare by value, and not be hashable.
_runs: "dict[int, dict[Part[Any], Any]]" = {}


class Part(Generic[_T]):
    """One thing that is kept about a trainer.

    Args:
        name: names it in a warning where ending it fails, as in "watching memory".
        end: called with (trainer, value) when the training ends, after which the value is dropped.
        instead: the consequence where ending it fails.
        outlives: whether the value is kept for further trainings of the trainer.
    """

    def __init__(
        self, name: str, end: Callable[[Any, _T], None] | None = None, instead: str = "", outlives: bool = False
    ) -> None:
        self.name, self.end, self.instead, self.outlives = name, end, instead, outlives

    def of(self, trainer: Any) -> _T | None:
        """Return the value for `trainer`; None where there is none."""
        value: _T | None = _runs.get(id(trainer), {}).get(self)
        return value

    def keep(self, trainer: Any, value: _T) -> _T:
        """Keep `value`, in place of one before, and return it."""
        if id(trainer) not in _runs:
            finalize(trainer, _runs.pop, id(trainer), None).atexit = False
            _runs[id(trainer)] = {}
        _runs[id(trainer)][self] = value
        return value

    def drop(self, trainer: Any) -> _T | None:
        """Forget the value for `trainer`, without ending it, and return it; None where there is none."""
        value: _T | None = _runs.get(id(trainer), {}).pop(self, None)
        return value


def end(trainer: Any) -> None:
    """End all parts of the training of `trainer`, the last first."""
    parts = _runs.get(id(trainer), {})
    with ExitStack() as ends:  # all of them, also where one fails under BALANCE_STRICT
        for part in [part for part in parts if not part.outlives]:
            value = parts.pop(part)
            if part.end is not None:
                ends.callback(attempt, part.name, part.end, trainer, value, instead=part.instead)


def end_quietly(trainer: Any) -> None:
    """Do so where training has failed: nothing of ours, also under BALANCE_STRICT, takes the place of that failure."""
    with suppress(Exception):
        end(trainer)
