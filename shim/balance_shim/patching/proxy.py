"""The stand-in for a patched function: wrapt's proxy, which shows the original's code, defaults and signature.

A module of its own because `import wrapt` costs more than all of arming; next to the patched library it is nothing.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import wrapt


def _reduce(proxy: Any) -> tuple[Any, ...]:
    """Pickle by name, as functions are: wrapt leaves that open, and workers are sent functions."""
    return pkgutil.resolve_name, (f"{proxy.__module__}:{proxy.__qualname__}",)


class _Bound(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]  # generic since wrapt 2, not subscriptable in 1.15
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _reduce(self)


class _Proxy(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    __bound_function_wrapper__ = _Bound

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _reduce(self)


def proxy(original: Callable[..., Any], wrapper: Callable[..., Any], acts: Callable[[], bool]) -> Callable[..., Any]:
    """Return a proxy of `original` that calls `wrapper` instead, with the same arguments, whenever `acts()`."""

    def call(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if acts():
            return wrapper(*args, **kwargs) if instance is None else wrapper(instance, *args, **kwargs)
        return wrapped(*args, **kwargs)

    stand_in: Callable[..., Any] = _Proxy(original, call)
    return stand_in
