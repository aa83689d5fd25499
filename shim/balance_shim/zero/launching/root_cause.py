"""Identify the rank that ended a training, among those that failed because of it."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .failure_record import FailureRecord, Frame, waits_for_others

Kind = Literal["refusal", "exception", "exit", "signal", "finished", "late", "communication", "unknown"]
# A signal with which torch, gloo and NCCL abort a rank themselves, mostly because of another one.
_OF_A_CONSEQUENCE = -signal.SIGABRT


@dataclass(frozen=True)
class RankEnd:
    """How far one rank is from its end.

    Attributes:
        exit_code: negative for a signal's number; None while it runs.
        record: its file where an exception has ended it.
        stack: where it is, innermost frame first; empty unless it runs and has been asked.
    """

    rank: int
    exit_code: int | None
    record: FailureRecord | None = None
    stack: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Cause:
    """Why a training has ended. `text` begins with the rank, as in "rank 1 was ended by SIGKILL"."""

    kind: Kind
    rank: int
    exit_code: int
    text: str

    @property
    def is_certain(self) -> bool:
        """Whether nothing that a rank may still do could be the cause instead."""
        return self.kind in ("refusal", "exception", "exit", "signal", "finished")


def judge(ends: Sequence[RankEnd]) -> Cause:
    """Return the cause, given all ranks, of which at least one has failed and none has been ended by the launcher."""
    failed = [end for end in ends if end.exit_code]
    fallback = failed[0].exit_code if failed else 1
    exceptions = [(end, end.record) for end in ends if end.record is not None and not end.record.is_communication]
    if exceptions:
        end, record = min(exceptions, key=lambda pair: pair[1].time)
        if not record.kind:
            return Cause("refusal", end.rank, _shell(end.exit_code or 1), record.message)
        place = f" ({record.place})" if record.place else ""
        colon = ": " if record.message else ""
        text = f"rank {end.rank} failed with {record.kind}{colon}{record.message}{place}"
        return Cause("exception", end.rank, _shell(end.exit_code or 1), text)
    # 1 last: it is also that of exceptions, which another hook may have shown.
    for end in sorted(failed, key=lambda end: end.exit_code == 1):
        if end.record is None and (end.exit_code or 0) > 0:
            return Cause(
                "exit", end.rank, _shell(end.exit_code), f"rank {end.rank} ended with exit code {end.exit_code}"
            )
    for end in failed:
        code = end.exit_code or 0
        if end.record is None and code < 0 and code != _OF_A_CONSEQUENCE:
            hint = ", as the kernel does where host memory runs out" if code == -signal.SIGKILL else ""
            return Cause("signal", end.rank, _shell(code), f"rank {end.rank} was ended by {_name(code)}{hint}")
    finished = [end.rank for end in ends if end.exit_code == 0]
    if finished:
        text = f"{_ranks(finished)} came to the end of the program while others waited for what all ranks do together"
        return Cause("finished", finished[0], _shell(fallback), text)
    late = [end for end in ends if end.exit_code is None and end.stack and not waits_for_others(list(end.stack))]
    if late:
        places = "; ".join(f"rank {end.rank} is at {_place(end.stack)}" for end in late)
        text = f"{_ranks([end.rank for end in late])} kept others waiting for longer than the time-out: {places}"
        return Cause("late", late[0].rank, _shell(fallback), text)
    recorded = [(end, end.record) for end in ends if end.record is not None]
    if recorded:
        end, record = min(recorded, key=lambda pair: pair[1].time)
        text = f"rank {end.rank} lost the others with {record.kind}: {record.message}"
        return Cause("communication", end.rank, _shell(end.exit_code or 1), text)
    end = failed[0] if failed else ends[0]
    return Cause("unknown", end.rank, _shell(fallback), f"rank {end.rank} was ended by {_name(end.exit_code or 0)}")


def _place(stack: Sequence[Frame]) -> str:
    return str(next((frame for frame in stack if frame.is_users), stack[0]))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _shell(code: int | None) -> int:
    """Return an exit code as a shell has it: 128 and the number for a signal."""
    return 1 if code is None else code if code >= 0 else 128 - code
