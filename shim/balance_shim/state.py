"""Decisions of arming: written by `arming`, read by the seams and the code behind them.

A module of its own because the seams must not import `arming`, which imports them.
"""

from __future__ import annotations

import os

from .errors import BalanceError

TYPE_CHECKING = False  # `typing` costs more than everything else arming imports; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .choices import Mode
    from .settings import SettingProblem, Settings

# With nothing but one of these set there is nothing to validate, so reading the settings, which costs more than the
# rest of arming, waits until a model library is there. The other libraries need more variables.
_PLAIN_MODES: tuple[Mode, ...] = ("balanced", "auto", "off")


SETTINGS_SAID = (
    "BALANCE_SHIM_SAID"  # a variable: the process that became this one has logged the faults of the settings
)


class Arming:
    """One decision to arm: the environment as it was at that moment, and the settings in it."""

    def __init__(self, environ: Mapping[str, str], default_mode: str):
        self.environ = {name: text for name, text in environ.items() if name.startswith("BALANCE_") and text.strip()}
        self.default_mode = default_mode
        self.pending: BalanceError | None = None  # an error that could not be raised when it occurred
        self._read: tuple[Settings, tuple[SettingProblem, ...]] | None = None

    @property
    def mode(self) -> Mode:
        """The mode asked for, without reading the settings where it can be told without."""
        plain = self.environ.get("BALANCE_MODE", self.default_mode).strip().lower()
        for mode in _PLAIN_MODES:
            if self.is_plain and mode == plain:
                return mode
        return self.settings.mode

    @property
    def is_plain(self) -> bool:
        """Whether at most a mode is asked for, one that cannot be wrong."""
        if not self.environ:
            return True
        return list(self.environ) == ["BALANCE_MODE"] and self.environ["BALANCE_MODE"].strip().lower() in _PLAIN_MODES

    @property
    def settings(self) -> Settings:
        return self._settings_and_problems()[0]

    @property
    def problems(self) -> tuple[SettingProblem, ...]:
        return () if self.is_plain else self._settings_and_problems()[1]

    def _settings_and_problems(self) -> tuple[Settings, tuple[SettingProblem, ...]]:
        if self._read is None:
            from .settings import read

            self._read = read(self.environ, self.default_mode)
        return self._read


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been deleted
        return None


_folder = _current_folder()
_arming: Arming | None = None
_enabled = False
_changes = 0


def begin(arming: Arming, enabled: bool) -> None:
    """Make `arming` the current one, and let patches act or not."""
    global _arming, _enabled, _changes
    _arming, _enabled = arming, enabled
    _changes += 1


def end() -> None:
    """Let no patch act any more. The settings stay readable, for calls that are under way."""
    global _enabled, _changes
    _enabled = False
    _changes += 1


def changes() -> int:
    """Return how often `begin` and `end` have been called: whoever acts on the state sees whether it still holds."""
    return _changes


def enabled() -> bool:
    """The kill switch: whether patches may act now. Asked on each call of a patched function."""
    return _enabled


def arming() -> Arming | None:
    """Return the current or, after `end`, the last arming."""
    return _arming


def settings() -> Settings:
    """Return the settings in force; those of the environment where nothing was armed."""
    return (_arming or Arming(os.environ, "off")).settings


def change(**fields: object) -> None:
    """Change fields of the settings in force: what mode `auto` decides counts as if the user had set it."""
    if _arming is not None:
        settings, problems = _arming._settings_and_problems()
        _arming._read = settings._replace(**fields), problems  # type: ignore[arg-type]  # whatever the field takes


def folder_at_start() -> str | None:
    """Return the folder in which this process was when the shim was imported; None if that cannot be known."""
    return _folder


def postpone(error: BalanceError) -> None:
    """Have `raise_pending` raise `error`."""
    if _arming is not None:
        _arming.pending = error


def is_pending() -> bool:
    """Whether `raise_pending` would raise."""
    return _arming is not None and _arming.pending is not None


def raise_pending() -> None:
    """Raise the problem of an explicit request that could not be raised when it was found.

    At interpreter start nothing may be raised, and libraries turn errors of an import into errors of their own.

    Wrappers call this before they act, outside of `guard.attempt`: at the first model rather than never.

    Raises:
        BalanceError: an explicit request in a `BALANCE_*` variable cannot be met.
    """
    if _arming is not None and _arming.pending is not None:
        raise type(_arming.pending)(str(_arming.pending))
