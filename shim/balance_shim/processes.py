"""The kind of this process. Imported at start-up, so it imports only `sys`."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType


def is_worker() -> bool:
    """Whether `multiprocessing` or a fork has made this process, for the sake of another one."""
    # `multiprocess`, which datasets uses, is a copy of it under a name of its own.
    modules = (sys.modules.get(name) for name in ("multiprocessing.process", "multiprocess.process"))
    return any(process is not None and _is_child(process) for process in modules)


def _is_child(process: ModuleType) -> bool:
    # While a new worker imports the script, it does not know its parent yet, but is marked as not ready.
    return process.parent_process() is not None or bool(getattr(process.current_process(), "_inheriting", False))
