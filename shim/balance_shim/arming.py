"""Arming and disarming: reads the settings once, and waits for the libraries whose classes are patched.

Nothing here imports a library or a seam. Each seam is imported and applied when the module it patches has been.
"""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock

from . import excepthook, log, state
from .errors import SettingError, SimulationError
from .patching import import_hooks
from .processes import is_worker
from .seams import KNOWN_TO_WORK, SEAMS
from .state import Arming

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from .patching.registry import Patch
    from .settings import Settings
    from .status_report import Status

# Held to decide who arms, never while hooks run: a hook imports, and another thread's import may be waiting for us.
_lock = allocate_lock()
_simulated = False


def install(**settings: object) -> None:
    """Arm the shim, as `import balance_shim` does. Armed already and given no settings, it does nothing.

    Args:
        settings: override the environment, named like the variables without their prefix: `mode="map"`,
            `device_map={"model.layers.0": 0}`, `max_memory="20GiB"`.

    Raises:
        SettingError: a value that cannot be used where continuing would ignore an explicit request.
        TypeError: there is no setting of that name.
    """
    if settings or not state.enabled():
        _arm(Arming(_environment_with(settings), "balanced"), may_raise=True)


def uninstall() -> None:
    """Disarm: every patched class and `sys.meta_path` are as they were. Simulated devices stay: torch keeps them."""
    with _lock:
        if not state.enabled():
            return
        state.end()
    _settle()


def status() -> Status:
    """Return whether the shim is armed, its mode, the functions that it has patched, and faults of the settings."""
    from .status_report import current_status

    return current_status()


def arm_on_import() -> None:
    """Arm for whoever imports the package; see there for the three kinds."""
    if _is_own_command():
        return
    if _interpreter_is_starting():
        alone = "BALANCE_SIMULATE" in os.environ
        _arm(Arming(os.environ, "off" if alone else "balanced"), may_raise=False)
    else:
        _arm(Arming(os.environ, "balanced"), may_raise=not is_worker())


def _arm(arming: Arming, may_raise: bool) -> None:
    if "BALANCE_SHIM_NOTES" in os.environ:  # one of the ranks that our launcher has started, or below one
        from .zero.launching.failure_record import leave_word

        leave_word()
    fatal = [problem.message for problem in arming.problems if problem.fatal]
    if fatal or arming.mode != "off":
        excepthook.install()
    if not arming.is_plain:
        log.set_level(arming.settings.log_level)
        _record_events(arming)
    _say_problems(arming, may_raise)
    if fatal:
        error = SettingError("\n".join(fatal))
        if may_raise:
            raise error
        arming.pending = error

    if arming.mode == "off" and arming.pending is None:
        uninstall()
        with _lock:
            state.begin(arming, enabled=False)
    else:
        with _lock:
            state.begin(arming, enabled=True)
        _settle()
    if not arming.is_plain and (arming.settings.simulate is not None or _is_simulation_refused(arming)):
        _simulate_with(arming)


def _record_events(arming: Arming) -> None:
    report = arming.settings.report
    folder = None if arming.mode == "off" or report in ("text", "off") else report
    if folder is not None or "balance_shim.report.events" in sys.modules:
        from .report import events

        events.record_to(folder)


def _settle() -> None:
    """Set or remove hooks and patches as the state has it, again if another thread has changed it meanwhile.

    No lock holds other threads off. Two orders make the result right: who changes the state settles afterwards, and who
    disarms removes the hooks last, so that setting them again makes the patches that he has taken away.
    """
    settled = None
    while settled != state.changes():
        settled = state.changes()
        if state.enabled():
            for leaf in SEAMS:
                import_hooks.watch(leaf, _apply_seam)
        else:
            _restore_patches()
            for leaf in SEAMS:
                import_hooks.unwatch(leaf, _apply_seam)
            excepthook.uninstall()


def _apply_seam(module: ModuleType) -> None:
    """Patch `module`, a leaf module that has just been imported."""
    if state.enabled():
        from .patching.guard import attempt

        attempt(f"patching {module.__name__}", _patch, module, instead="continuing without balance_shim")
        if not state.enabled():  # uninstalled by another thread meanwhile
            _settle()


def _patch(module: ModuleType) -> None:
    from importlib import import_module

    from .patching import guard, registry

    name = module.__name__
    before = registry.patches()
    try:
        import_module(SEAMS[name]).apply(module)
    except Exception as failure:
        # All of a seam or nothing: half of it would be a third behaviour that nobody has tested.
        registry.restore(_patches_of(name, before))
        if not isinstance(failure, guard.SeamMoved) or state.settings().strict:
            raise
        library = name.partition(".")[0]
        log.once(
            "warning",
            f"{library} {failure.version} has no {failure.what}, which balance_shim patches"
            f" (known to work: {library} {' to '.join(KNOWN_TO_WORK[library])}); continuing without balance_shim",
        )
    else:
        for patch in _patches_of(name, before):
            log.debug(f"patched {patch.target}")


def _patches_of(module: str, before: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """Return the patches of functions of `module` that were not there `before`."""
    from .patching import registry

    return tuple(patch for patch in registry.patches() if patch not in before and patch.module == module)


def _restore_patches() -> None:
    if "balance_shim.patching.registry" in sys.modules:  # otherwise no seam was ever applied
        from .patching import registry  # not out of sys.modules: another thread may still be importing it

        registry.restore()


def _simulate_with(arming: Arming) -> None:
    def simulate(torch: ModuleType) -> None:
        global _simulated
        if arming.settings.simulate is None:
            raise arming.pending or SimulationError("BALANCE_SIMULATE cannot be used")
        if _simulated:
            return
        _simulated = True
        try:
            _set_up_simulation(arming.settings)
        except SimulationError:
            raise
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
            raise SimulationError(f"BALANCE_SIMULATE: simulated devices cannot be set up ({reason})") from failure
        if arming.mode == "off" and "BALANCE_MODE" not in arming.environ:
            log.info("devices are simulated but nothing is balanced: BALANCE_MODE is not set")

    import_hooks.watch("torch", simulate)


def _set_up_simulation(settings: Settings) -> None:
    from . import simulation

    assert settings.simulate is not None  # or there would be no hook on torch
    simulation.install(settings.simulate)
    simulation.report_at_exit(None if settings.report in ("text", "off") else settings.report)


def _is_simulation_refused(arming: Arming) -> bool:
    return any(problem.fatal and problem.variable == "BALANCE_SIMULATE" for problem in arming.problems)


def _say_problems(arming: Arming, may_raise: bool) -> None:
    """Log each problem once, except those about to be raised and those that a parent process logged."""
    if not arming.problems or is_worker() or state.SETTINGS_SAID in os.environ:
        return

    def say(_: ModuleType | None) -> None:
        for problem in arming.problems:
            if not (problem.fatal and may_raise):
                log.once("error" if problem.fatal else "warning", problem.message)

    from importlib.machinery import PathFinder

    # An interpreter that has no torch inherited our variables from a program that has, and is not concerned.
    if may_raise or PathFinder.find_spec("torch") is not None:
        say(None)
    else:
        import_hooks.watch("torch", say)


def _environment_with(settings: dict[str, object]) -> dict[str, str]:
    environ = dict(os.environ)
    if settings:
        from .settings import VARIABLES

        names = [variable.name for variable in VARIABLES]
        for name, value in settings.items():
            variable = f"BALANCE_{name.upper()}"
            if variable not in names:
                raise TypeError(f"install() has no setting {name!r}; there are {', '.join(names)}")
            environ[variable] = _as_text(value)
    return environ


def _as_text(value: object) -> str:
    """Return `value` as the text of a variable, so that one parser and one set of rules apply."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, dict):
        import json

        return json.dumps(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(str, value))
    return str(value)


def _interpreter_is_starting() -> bool:
    """Whether `site`, which runs every sitecustomize, is still at work."""
    return bool(getattr(getattr(sys.modules.get("site"), "__spec__", None), "_initializing", False))


def _is_own_command() -> bool:
    """Whether this process is `balance-shim` or `python -m balance_shim`.

    While `-m` looks for its module, `sys.argv[0]` is "-m" and the module's name stands only in `sys.orig_argv`, in
    front of the arguments that both share: as a word of its own, or as in `-mbalance_shim`.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program != "-m":
        return os.path.basename(program) == "balance-shim"
    argument = sys.orig_argv[-len(sys.argv)]
    return (argument.partition("m")[2] if argument.startswith("-") else argument).partition(".")[0] == "balance_shim"
