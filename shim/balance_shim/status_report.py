"""The state of the shim in this process. Apart from `arming` because arming must not import `typing`."""

import sys
from typing import NamedTuple

from . import state
from .choices import Mode
from .patching import registry


class PatchedSeam(NamedTuple):
    """A function of a library that is patched now: its full name, and the version of the library."""

    target: str
    version: str


class Status(NamedTuple):
    """The result of `balance_shim.status()`.

    Attributes:
        armed: whether patches act, and libraries that are imported later will be patched.
        mode: one of `settings.MODES`; "off" when not armed.
        seams: the patched functions. Empty until the library is imported.
        problems: the lines logged about `BALANCE_*` variables.
    """

    armed: bool
    mode: Mode
    seams: tuple[PatchedSeam, ...]
    problems: tuple[str, ...]


def current_status() -> Status:
    """Return the status of this process."""
    arming = state.arming()
    return Status(
        armed=state.enabled(),
        mode=arming.mode if arming is not None and state.enabled() else "off",
        seams=tuple(PatchedSeam(patch.target, _version(patch.target)) for patch in registry.patches()),
        problems=tuple(problem.message for problem in arming.problems) if arming is not None else (),
    )


def _version(target: str) -> str:
    return str(getattr(sys.modules.get(target.partition(".")[0]), "__version__", "unknown"))
