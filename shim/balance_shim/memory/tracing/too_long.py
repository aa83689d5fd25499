"""Models that took too long to trace, for instance with a loop over positions; each is given up once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

Run = Literal["trace", "dry run"]  # a trace runs each distinct block once, a dry run more of them

_shortest: "WeakKeyDictionary[nn.Module, dict[Run, int]]" = WeakKeyDictionary()

_estimating = False


@contextmanager
def estimating() -> Iterator[None]:
    """Run no model on shapes for as long as this lasts, as if each had taken too long.

    Results from meanwhile must not be cached.
    """
    global _estimating
    before, _estimating = _estimating, True
    try:
        yield
    finally:
        _estimating = before


def note(model: "nn.Module", run: Run, seq_len: int) -> None:
    """Note that `run` of `model` with sequences of `seq_len` tokens was given up."""
    lengths = _shortest.setdefault(model, {})
    lengths[run] = min(seq_len, lengths.get(run, seq_len))


def is_known(model: "nn.Module", run: Run, seq_len: int) -> bool:
    """Whether `run` of `model` was given up with sequences that were no longer than `seq_len` tokens."""
    lengths = _shortest.get(model, {})
    return _estimating or any(seq_len >= lengths[name] for name in {run, "trace"} & lengths.keys())
