"""`events.jsonl` in the report folder: warnings, errors, repairs, moves and findings, one JSON object per line."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from .. import log
from ..choices import EventKind

FILE = "events.jsonl"
BEGAN = "BALANCE_SHIM_BEGAN"  # a variable: when the process began that became this one, or started it
_folder: str | None = None
_began = time.time()
_listening = False


def record_to(folder: str | None) -> None:
    """Append what `log` reports from now on to `events.jsonl` in `folder`; None ends that.

    The file is made with the first event. Each rank has its own: `events-rank1.jsonl`.
    """
    global _folder, _began, _listening
    _folder, _began = folder, _inherited() or time.time()
    if folder is not None and not _listening:
        _listening = True
        log.listen(_add)


def began() -> float:
    """Return when the shim was armed, in seconds of Unix time: the events of this run are not older."""
    return _began


def _inherited() -> float:
    try:
        return float(os.environ.get(BEGAN, "0"))
    except ValueError:
        return 0.0


def _add(level: str, message: str, kind: EventKind, facts: Mapping[str, Any]) -> None:
    if _folder is None:
        return
    rank = os.environ.get("RANK") or "0"
    name = FILE if rank == "0" else FILE.replace(".", f"-rank{rank}.")
    event = {"time": round(time.time(), 3), "level": level, "kind": kind, "text": message, **facts}
    os.makedirs(_folder, exist_ok=True)
    # One write in append mode: processes of one rank (a launcher and what it starts) do not mix their lines.
    with open(os.path.join(_folder, name), "a", encoding="utf-8") as file:
        file.write(json.dumps(event, default=str) + "\n")
