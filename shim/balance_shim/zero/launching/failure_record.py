"""The failure record of a rank: a file by which the launcher tells the cause from its consequences.

When one rank ends, the other ranks fail as well, within milliseconds: "Connection closed by peer". Such an error is not
shown by the rank that it meets but left to the launcher, which shows it if nothing else explains the end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from . import refusal_file

LONGEST_MESSAGE = 400  # characters
# The launcher's way to ask a rank that is still running where it is.
ASK = getattr(signal, "SIGRTMIN", 0) + 6 if hasattr(faulthandler, "register") else 0
_LAUNCHER = "BALANCE_SHIM_LAUNCHER"  # a variable that the launcher sets
# gloo and NCCL report through RuntimeError in torch before 2.7 at least; their texts name the library or the socket.
_COMMUNICATION = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Timed out waiting",
    "Socket Timeout",
    "wait timeout",
)
_NOT_THE_USERS = ("site-packages", "dist-packages", "<frozen", os.path.dirname(os.__file__),
                  str(Path(os.path.abspath(__file__)).parents[2]))  # fmt: skip
_stack_file: Any = None


@dataclass(frozen=True)
class FailureRecord:
    """How a rank has failed.

    Attributes:
        time: seconds since the epoch.
        kind: the exception's type; empty for a `BalanceError`, whose message is to be shown alone.
        message: its text, in one line.
        place: file, line and function outside of installed packages; empty where there is none.
        is_communication: whether it tells of another rank's end only.
    """

    time: float
    kind: str
    message: str
    place: str
    is_communication: bool


def leave_word() -> None:
    """Have this rank leave a record where an exception ends it, and answer when the launcher asks where it is.

    For processes that our launcher has started, and only those: not for what they start themselves.
    """
    global _stack_file
    folder, launcher = os.environ.get(refusal_file.FOLDER, ""), os.environ.get(_LAUNCHER, "")
    if not os.path.isdir(folder) or launcher != str(os.getppid()) or isinstance(sys.excepthook, _Hook):
        return
    sys.excepthook = _Hook(sys.excepthook, os.path.join(folder, os.environ.get("RANK", "0")))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the launcher blocks it until there is the hook
    if ASK:
        _stack_file = open(os.path.join(folder, f"{os.environ.get('RANK', '0')}.stack"), "w")  # noqa: SIM115
        faulthandler.register(ASK, file=_stack_file, all_threads=False)


class _Hook:
    """In the place of `sys.excepthook`."""

    def __init__(self, before: Any, path: str) -> None:
        self._before, self._path = before, path

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):  # the launcher has passed it on, and logs it once
            return
        try:
            record = _record(error, trace)
            if record.is_communication:
                with open(f"{self._path}.traceback", "w", encoding="utf-8") as file:
                    file.write("".join(traceback.format_exception(kind, error, trace)))
            with open(f"{self._path}.failure", "w", encoding="utf-8") as file:
                json.dump(asdict(record), file)
            if record.is_communication:
                return
        except Exception:  # the disk is full, or the exception cannot be shown: as without us
            pass
        self._before(kind, error, trace)


def read_record(folder: str, rank: int) -> FailureRecord | None:
    """Return the record of `rank` in `folder`; None where it has left none."""
    refused = refusal_file.path(folder, rank)
    try:
        if os.path.exists(refused):
            with open(refused, encoding="utf-8") as file:
                return FailureRecord(os.path.getmtime(refused), "", file.read(), "", False)
        with open(os.path.join(folder, f"{rank}.failure"), encoding="utf-8") as file:
            return FailureRecord(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def read_traceback(folder: str, rank: int) -> str:
    """Return the traceback that `rank` has left to the launcher to show."""
    try:
        with open(os.path.join(folder, f"{rank}.traceback"), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


@dataclass(frozen=True)
class Frame:
    """One line of a rank's stack."""

    file: str
    line: int
    function: str

    @property
    def is_users(self) -> bool:
        return not any(part in self.file for part in _NOT_THE_USERS)

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}, in {self.function}"


def read_stack(folder: str, rank: int) -> list[Frame]:
    """Return where the running `rank` was when it was asked, innermost first; empty where it has not answered."""
    try:
        with open(os.path.join(folder, f"{rank}.stack"), encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    frames = []
    for line in lines:
        head, separator, function = line.rpartition(" in ")
        name, comma, number = head.rpartition(", line ")
        if separator and comma and number.isdigit() and name.startswith('  File "'):
            frames.append(Frame(name[len('  File "') : -1], int(number), function))
    return frames


def waits_for_others(stack: list[Frame]) -> bool:
    """Whether a rank with this stack, innermost frame first, is in an operation of several ranks."""
    waiting = ("torch/distributed/", "deepspeed/", "torch/autograd/graph.py", "torch/cuda/", "balance_shim/zero/")
    return bool(stack) and any(part in stack[0].file.replace(os.sep, "/") for part in waiting)


def _record(error: BaseException, trace: TracebackType | None) -> FailureRecord:
    frames = [Frame(entry.filename, entry.lineno or 0, entry.name) for entry in traceback.extract_tb(trace)]
    users = [frame for frame in frames if frame.is_users]
    place = str(users[-1]) if users else ""
    message = " ".join(str(error).split())[:LONGEST_MESSAGE]
    return FailureRecord(time.time(), type(error).__name__, message, place, is_communication(error))


def is_communication(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, means that another rank is gone or has not come in time."""
    cause: BaseException | None = error
    while cause is not None:
        if any(
            base.__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") for base in type(cause).__mro__
        ):
            return True
        if isinstance(cause, RuntimeError | OSError) and any(part in str(cause) for part in _COMMUNICATION):
            return True
        cause = cause.__cause__
    return False
