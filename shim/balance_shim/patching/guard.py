"""Fail-open: a failure of the shim must not become a failure of the program."""

from __future__ import annotations

from .. import log, state
from ..errors import BalanceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class SeamMoved(Exception):
    """The function that a seam patches is not where every known version of the library has it; named in the message."""

    def __init__(self, what: str, version: str):
        super().__init__(what)
        self.what = what
        self.version = version


def attempt(
    action: str,
    function: Callable[..., Any],
    *args: Any,
    default: Any = None,
    instead: str = "the library's own behaviour applies",
) -> Any:
    """Return `function(*args)`; if it fails, log one warning and return `default`.

    The original of a patched function never belongs in here: its errors are the program's own.

    Args:
        action: names the failing part in the warning, as in "planning the device map".
        default: the value that the caller goes on with.
        instead: the consequence, for the warning.

    Raises:
        BalanceError: raised by `function`, for an explicit request that cannot be met.
        Exception: anything else raised by `function`, where `BALANCE_STRICT` is set.
    """
    try:
        return function(*args)
    except BalanceError:
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}".rstrip(": ")
        line = " ".join(f"{action} failed ({reason})".split())
        if state.settings().strict:
            log.error(f"{line}; stopping because BALANCE_STRICT is set")
            raise
        log.once("warning", f"{line}; {instead}")
        return default


def insist(action: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, for an explicit request of the user: there is no fallback.

    Raises:
        BalanceError: it failed.
    """
    try:
        return function(*args)
    except BalanceError:
        raise
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise BalanceError(f"{action} failed ({reason})") from failure
