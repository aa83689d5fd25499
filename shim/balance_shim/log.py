"""The shim's own voice: single lines on standard error, from the first process only.

`logging` is not used at arming because importing it costs more than everything else arming does, and because at
interpreter start nobody has configured it yet.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # `typing` costs more than everything else arming imports; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .choices import EventKind

    Listener = Callable[[str, str, EventKind, Mapping[str, Any]], None]

LEVELS = ("debug", "info", "warning", "error")
_threshold = LEVELS.index("info")
_said: set[str] = set()
_errors: dict[str, float] = {}  # line logged as an error -> when
_listeners: list[Listener] = []


def set_level(level: str) -> None:
    """Show messages of `level` (one of `LEVELS`) and above."""
    global _threshold
    _threshold = LEVELS.index(level)


def shows(level: str) -> bool:
    """Whether messages of `level` are shown."""
    return LEVELS.index(level) >= _threshold


def is_first_process() -> bool:
    """Whether this is the one process of a distributed run that speaks (rank 0), or there is just one."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")


def listen(listener: Listener) -> None:
    """Call `listener` with level, message, kind and facts of each warning, error, and message that has a kind.

    Also of those below the level that is shown. A listener that fails is ignored.
    """
    _listeners.append(listener)


def debug(message: str) -> None:
    _say("debug", message)


def info(message: str, kind: EventKind = "message", facts: Mapping[str, Any] | None = None) -> None:
    _say("info", message, kind=kind, facts=facts)


def warning(message: str, kind: EventKind = "message", facts: Mapping[str, Any] | None = None) -> None:
    _say("warning", message, kind=kind, facts=facts)


def error(
    message: str, kind: EventKind = "message", facts: Mapping[str, Any] | None = None, shown: str | None = None
) -> None:
    """Log an error; `shown` is the message in the user's language, which listeners do not get."""
    _say("error", message, kind=kind, facts=facts, shown=shown)


def is_fresh(message: str, seconds: float) -> bool:
    """Whether the error `message` was logged within the last `seconds`."""
    return message in _errors and time.monotonic() - _errors[message] < seconds


def error_of_any_rank(
    message: str, kind: EventKind = "message", facts: Mapping[str, Any] | None = None, shown: str | None = None
) -> None:
    """Log `message` whichever process this is, for an event of this process alone; see `error`."""
    rank = f"rank {os.environ.get('RANK', '0')}: "
    shown = None if shown is None else rank + shown
    _say("error", rank + message, anywhere=True, kind=kind, facts=facts, shown=shown)


def once(level: str, message: str) -> None:
    """Log `message` the first time only, for events that a script may repeat, such as loading a model."""
    if message not in _said:
        _said.add(message)
        _say(level, message)


def _say(
    level: str,
    message: str,
    anywhere: bool = False,
    kind: EventKind = "message",
    facts: Mapping[str, Any] | None = None,
    shown: str | None = None,
) -> None:
    if not (anywhere or is_first_process()):
        return
    if kind != "message" or level in ("warning", "error"):
        _tell(level, message, kind, facts or {})
    if not shows(level) or sys.stderr is None:
        return
    if level == "error":
        _errors[message] = time.monotonic()
    mark = "" if level == "info" else f"{level}: "
    try:
        sys.stderr.write(f"balance_shim: {mark}{message if shown is None else shown}\n")
        sys.stderr.flush()
    except Exception:  # closed, full, or replaced by something that only half behaves: no reason to stop a training
        pass


def _tell(level: str, message: str, kind: EventKind, facts: Mapping[str, Any]) -> None:
    for listener in _listeners:
        try:  # noqa: SIM105, contextlib would have to be imported while arming
            listener(level, message, kind, facts)
        except Exception:  # a record is no reason to stop a training
            pass
