"""The modes of `BALANCE_MODE`: one object each, with a method for each moment that seams report."""

from .. import state
from .base import Mode


def current() -> Mode:
    """Return the mode in force in this process. A mode is imported only where it is in force."""
    name = state.settings().mode
    if name == "zero3":
        from ..zero.launching import relaunch

        if relaunch.is_launcher():
            from .launcher import ZeroLauncher

            return ZeroLauncher()
        from .zero3 import Zero3

        return Zero3()
    if name in ("balanced", "auto"):
        if state.settings().replicas != 1:
            from ..zero.launching import relaunch

            if relaunch.is_launcher():
                from .launcher import ReplicaLauncher

                return ReplicaLauncher()
        if name == "auto":
            from .auto import Auto

            return Auto()
        from .balanced import Balanced

        return Balanced()
    if name == "map":
        from .user_map import UserMap

        return UserMap()
    return Mode()
