"""What kind of process this is. Imported at start-up, so it imports nothing but `sys`."""

from __future__ import annotations

import sys


def is_worker() -> bool:
    """Whether `multiprocessing` or a fork has made this process, for the sake of another one."""
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return False
    # While a new worker imports the script, it does not know its parent yet, but is marked as not ready.
    return process.parent_process() is not None or bool(getattr(process.current_process(), "_inheriting", False))
