"""The registry of patches: replaced attributes and their originals.

Of a classmethod, staticmethod or property a patch leaves a plain function in the same descriptor: neighbours take
`Class.method.__func__`, patch, and later put `classmethod(that)` back, which no proxy object survives. Of all other
functions it leaves wrapt's proxy: neighbours read `__code__`, defaults, signature and source, and see the original's.
"""

from __future__ import annotations

import functools
from _thread import allocate_lock
from collections.abc import Callable
from typing import Any

from .. import log
from ..state import enabled

ABSENT: Any = object()  # in place of an original that the owner did not have itself but inherited

_lock = allocate_lock()
_patches: list[Patch] = []


class Patch:
    """One replaced attribute of a class or module.

    Attributes:
        original: the object in `vars(owner)` before, descriptor and all, or `ABSENT`.
        function: the function that is called now, without its descriptor.
        live: false once uninstalled. A neighbour may have wrapped `function` and keep calling it for ever; it then
            passes everything on, even when a later patch stands on top of that neighbour.
    """

    def __init__(self, owner: Any, name: str, original: Any):
        self.owner = owner
        self.name = name
        self.original = original
        self.live = True
        self.function: Callable[..., Any]

    @property
    def module(self) -> str:
        """The name of the module that is the owner, or that defines it."""
        return str(getattr(self.owner, "__module__", None) or self.owner.__name__)

    @property
    def target(self) -> str:
        """The full name of the patched function, as in "transformers.trainer.Trainer.__init__"."""
        return ".".join(filter(None, (self.module, getattr(self.owner, "__qualname__", ""), self.name)))

    def acts(self) -> bool:
        """The kill switch, asked at each call."""
        return self.live and enabled()

    def is_current(self) -> bool:
        """Whether the owner's attribute leads to our function directly, in whatever descriptor."""
        return _function_in(vars(self.owner).get(self.name)) is self.function

    def restore(self) -> None:
        """Put the original back, unless somebody has wrapped on top of us: then our layer only turns transparent."""
        self.live = False
        if not self.is_current():
            return
        if self.original is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


def replace(owner: Any, name: str, wrapper_factory: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    """Replace the function `owner.name` by `wrapper_factory(original)`; the second time nothing happens.

    `original` is the plain function (it takes `self` or `cls` as its first argument). The wrapper is called with the
    same arguments while the shim is enabled, and must call `original` exactly once.

    Raises:
        AttributeError: `owner` has no such attribute, not even an inherited one.
        TypeError: the attribute is no function.
    """
    while True:
        raw = vars(owner).get(name, ABSENT)
        attribute = _inherited(owner, name) if raw is ABSENT else raw
        original = _function_in(attribute)
        if not callable(original):
            raise TypeError(f"{owner!r} has {name}, but {attribute!r} is not a function")
        patch = Patch(owner, name, raw)
        kind = type(attribute) if isinstance(attribute, (classmethod, staticmethod, property)) else None
        stand_in = _proxy if kind is None else _plain_function
        patch.function = stand_in(original, wrapper_factory(original), patch.acts)  # may import: not under the lock
        with _lock:
            if vars(owner).get(name, ABSENT) is not raw:
                continue  # another thread was faster: look again at what is there now
            standing = _standing(owner, name, original)
            if standing is not None:
                return standing
            setattr(owner, name, patch.function if kind is None else kind(patch.function))
            _patches.append(patch)
            return patch


def restore(patches: tuple[Patch, ...] | None = None) -> None:
    """Undo `patches`, by default all, the latest first."""
    with _lock:
        for patch in reversed(patches if patches is not None else tuple(_patches)):
            patch.restore()
            if patch in _patches:
                _patches.remove(patch)


def patches() -> tuple[Patch, ...]:
    """Return the patches in place, in the order in which they were made."""
    return tuple(_patches)


def is_ours(function: Any) -> bool:
    """Whether `function`, as it stands in a class or module, is a patch that is in force."""
    return any(_function_in(function) is patch.function for patch in _patches)


def _plain_function(
    original: Callable[..., Any], wrapper: Callable[..., Any], acts: Callable[[], bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return wrapper(*args, **kwargs) if acts() else original(*args, **kwargs)

    return function


def _proxy(original: Callable[..., Any], wrapper: Callable[..., Any], acts: Callable[[], bool]) -> Callable[..., Any]:
    try:
        from .proxy import proxy
    except ModuleNotFoundError:  # put on PYTHONPATH rather than installed
        log.once(
            "warning", "wrapt is not installed; patched functions do not look like the originals (pip install wrapt)"
        )
        return _plain_function(original, wrapper, acts)
    return proxy(original, wrapper, acts)


def _standing(owner: Any, name: str, function: Any) -> Patch | None:
    """Return our patch if `function`, what the owner has now, is it or wraps it.

    Otherwise somebody has put something else there, the original or (after a reload) a new function: the patch is
    forgotten and switched off, so that a new one never acts twice, even if the old one is still called underneath.
    """
    for patch in _patches:
        if patch.owner is owner and patch.name == name:
            while function is not None and function is not patch.function:
                function = getattr(function, "__wrapped__", None)
            if function is not None:
                return patch
            patch.live = False
            _patches.remove(patch)
            return None
    return None


def _function_in(attribute: Any) -> Any:
    if isinstance(attribute, property):
        return attribute.fget
    return attribute.__func__ if isinstance(attribute, (classmethod, staticmethod)) else attribute


def _inherited(owner: Any, name: str) -> Any:
    for base in getattr(owner, "__mro__", ()):
        if name in vars(base):
            return vars(base)[name]
    raise AttributeError(f"{owner!r} has no attribute {name!r}")
