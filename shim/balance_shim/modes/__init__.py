"""Modes: what `BALANCE_MODE` does at each moment of a training. Seams call the mode in force and know none by name.

A mode is imported when it is in force, so that arming and the other modes do not pay for it.
"""

from .. import state
from .base import Mode

_PLACED = Mode()


def current() -> Mode:
    """Return the mode in force in this process.

    The launcher of ZeRO-3 does not train: it starts the processes that do, and has no moment of its own.
    """
    if state.settings().mode == "zero3":
        from ..zero.launching import relaunch

        if not relaunch.is_launcher():
            from .zero3 import ZERO3

            return ZERO3
    return _PLACED
