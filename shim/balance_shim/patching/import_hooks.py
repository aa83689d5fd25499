"""Callbacks for when a module has been imported, without importing it.

A finder in front of `sys.meta_path` lets the finders behind it find a watched module and puts its own loader around
the one they found. That loader steps aside before the module's body runs, so the module never sees it: `__loader__`
and `__spec__.loader` are what they would be without it.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock, get_ident  # `threading` is not loaded yet when an interpreter starts

from .guard import attempt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    Callback = Callable[[ModuleType], object]

# Guards the tables below for a few instructions, never while a callback runs or a module is imported: the import
# system holds locks of its own around us, and two threads taking both in different order would wait forever.
_lock = allocate_lock()
_watched: dict[str, tuple[Callback, ...]] = {}
_searching: set[tuple[int, str]] = set()  # (thread, module) pairs that are inside `_Finder.find_spec`
_executing: set[str] = set()  # modules whose body our loader is running; they fire when it is done
_waiting: dict[str, list[Callback]] = {}  # for modules whose body another loader is running
# What was watched while its module was not there. Another thread may just have found that module without us and not
# put it into `sys.modules` yet, so this is looked through at each import until the module is seen.
_unseen: set[tuple[str, Callback]] = set()


def watch(name: str, callback: Callback) -> None:
    """Call `callback(module)` whenever the module `name` has been executed; at once if it is there already.

    A module that is half-way through its body, in this thread or another, counts as not there yet. Watching the same
    pair again does nothing.
    """
    with _lock:
        if callback in _watched.get(name, ()):
            return
        _watched[name] = (*_watched.get(name, ()), callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        if name in _executing:
            return
        _unseen.add((name, callback))
    _look_for(name, callback)


def unwatch(name: str, callback: Callback) -> None:
    """Undo `watch`. With nothing left to watch, `sys.meta_path` is as it was."""
    with _lock:
        _unseen.discard((name, callback))
        left = tuple(other for other in _watched.pop(name, ()) if other != callback)
        if left:
            _watched[name] = left
        if not _watched and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


def _look_for(name: str, callback: Callback) -> None:
    """Call `callback` if the module is there, now or when its body is done."""
    module = sys.modules.get(name)
    if module is None:
        return
    with _lock:
        if (name, callback) not in _unseen:
            return  # another thread was faster, or our loader has it
        _unseen.discard((name, callback))
    if _is_half_way(module):
        _call_when_done(module, callback)
    else:
        _call(name, callback, module)


def _call(name: str, callback: Callback, module: ModuleType) -> None:
    attempt(f"a hook on {name}", callback, module, instead="the import is not affected")


class _Finder:
    """Finds watched modules by asking the finders behind it; knows nothing of its own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for name, callback in tuple(_unseen):
            if name in sys.modules:
                _look_for(name, callback)
        if fullname not in _watched:
            return None
        # A finder behind us may start a search of its own that comes back here: other import hooks do.
        search = (get_ident(), fullname)
        if search in _searching:
            return None
        _searching.add(search)
        try:
            spec = self._find_behind(fullname, path, target)
        finally:
            _searching.discard(search)
        loader = getattr(spec, "loader", None)
        if spec is not None and hasattr(loader, "exec_module") and not isinstance(loader, _Loader):
            spec.loader = _Loader(loader)  # type: ignore[assignment]
        return spec

    def _find_behind(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        # Not importlib.util.find_spec, which imports parent packages and with them takes locks out of order.
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Stands around the real loader until the module's body is about to run, then fires after it has."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # for those who only look, such as runpy and pkgutil
        if name == "_loader":  # a copy that is not initialised yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        current: object = spec.loader if spec is not None else None
        if spec is not None and current is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        name = module.__name__
        with _lock:
            _executing.add(name)
            _forget(name)
        try:
            self._loader.exec_module(module)
        finally:
            with _lock:
                _executing.discard(name)
                callbacks = _watched.get(name, ())
        for callback in callbacks:
            _call(name, callback, sys.modules.get(name, module))  # it may have put something else in its place


def _forget(name: str) -> None:
    _unseen.difference_update([pair for pair in _unseen if pair[0] == name])


def _is_half_way(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _call_when_done(module: ModuleType, callback: Callback) -> None:
    """Call `callback` once the import of `module`, which began before anybody watched, has succeeded.

    The import system tells nobody that it is done, but it notes so in the module's spec, which for that time gets a
    class that hears it.
    """
    spec: Any = module.__spec__
    name = module.__name__
    with _lock:
        waiting = _waiting.setdefault(name, [])
        waiting.append(callback)
        if len(waiting) == 1:
            spec.__class__ = _hearing(type(spec), name)
    if not spec._initializing:  # another thread finished it just before the class was changed
        _done(spec, name)


def _hearing(plain: type, name: str) -> type:
    """Return a class like `plain` whose instances call `_done` when `_initializing` becomes false."""

    def get(spec: Any) -> Any:
        return spec.__dict__.get("_initializing", False)

    def put(spec: Any, value: Any) -> None:
        spec.__dict__["_initializing"] = value
        if not value:
            _done(spec, name)

    return type(plain.__name__, (plain,), {"_initializing": property(get, put), "_plain": plain})


def _done(spec: Any, name: str) -> None:
    with _lock:
        callbacks = _waiting.pop(name, [])
        if callbacks:
            spec.__class__ = spec._plain
    # Gone from sys.modules: it failed. Not watched any more: disarmed in the meantime.
    for callback in callbacks:
        if name in sys.modules and callback in _watched.get(name, ()):
            _call(name, callback, sys.modules[name])


_finder = _Finder()
