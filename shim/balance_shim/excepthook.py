"""`sys.excepthook` while the shim is armed: an explicit request that cannot be met ends a program with one line.

Standard library only, because arming installs it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

REMIND = 120  # seconds; a line logged earlier than that, at the start, is logged again where the program ends


def install() -> None:
    """Have a `BalanceError` that nobody catches shown as one line. Other errors, and prompts, are as they were.

    So is Ctrl-C while a program loads that is about to become several ranks: they and their launcher show one line.
    """
    if not isinstance(sys.excepthook, _Hook) and not hasattr(sys, "ps1"):
        sys.excepthook = _Hook(sys.excepthook)


def uninstall() -> None:
    """Put back the hook that was there, unless the program has set one of its own since."""
    if isinstance(sys.excepthook, _Hook):
        sys.excepthook = sys.excepthook.before


class _Hook:
    """In the place of `sys.excepthook`."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        from . import log
        from .errors import BalanceError

        if issubclass(kind, KeyboardInterrupt) and _is_before_ranks():
            log.info("ended by SIGINT")
            _end_by_interrupt()
        # One with a cause is a failure of the shim's own, which has to be found.
        if not isinstance(error, BalanceError) or error.__cause__ is not None or log.shows("debug"):
            self.before(kind, error, traceback)
            return
        from .zero.launching import refusal_file

        message = " ".join(str(error).split())
        if not refusal_file.leave(message) and not log.is_fresh(message, REMIND):
            log.error(message)


def _end_by_interrupt() -> None:
    """End this process as Python does after Ctrl-C, which it forgets where a hook imports modules (3.11)."""
    import atexit
    import signal

    atexit._run_exitfuncs()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _is_before_ranks() -> bool:
    """Whether this process trains under ZeRO-3 and has not become the launcher of its ranks yet."""
    from . import state

    # Their parts stay in there where the interrupt has come while one of the two was imported.
    loads = any(name.partition(".")[0] in ("torch", "transformers") for name in sys.modules)
    if hasattr(sys, "ps1") or not loads or not state.settings().uses_deepspeed:
        return False
    from .zero.launching import relaunch

    return not relaunch.is_launched(os.environ) and not relaunch.is_launcher()
