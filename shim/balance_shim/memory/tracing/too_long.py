"""Models that took too long to trace, for instance with a loop over positions; each is given up once."""

from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

Run = Literal["trace", "trial"]  # a trace runs each distinct block once, a trial more of them

_shortest: "WeakKeyDictionary[nn.Module, dict[Run, int]]" = WeakKeyDictionary()


def note(model: "nn.Module", run: Run, seq_len: int) -> None:
    """Note that `run` of `model` with sequences of `seq_len` tokens was given up."""
    lengths = _shortest.setdefault(model, {})
    lengths[run] = min(seq_len, lengths.get(run, seq_len))


def is_known(model: "nn.Module", run: Run, seq_len: int) -> bool:
    """Whether `run` of `model` was given up with sequences that were no longer than `seq_len` tokens."""
    lengths = _shortest.get(model, {})
    return any(seq_len >= lengths[each] for each in {run, "trace"} & lengths.keys())
