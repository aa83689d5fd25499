"""`deepspeed.runtime.engine`: where a step is over, and weights that the script itself used can be partitioned."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `deepspeed.runtime.engine`.

    Raises:
        SeamMoved: this version trains somewhere else.
    """
    owner = getattr(module, "DeepSpeedEngine", None)
    for name, wrapper in (("backward", _around_backward), ("step", _around_step)):
        if not callable(getattr(owner, name, None)):
            raise SeamMoved(f"{module.__name__}.DeepSpeedEngine.{name}", version_text("deepspeed"))
        registry.replace(owner, name, wrapper)
    if callable(getattr(owner, "no_sync", None)):  # from DeepSpeed 0.15 on
        registry.replace(owner, "no_sync", _around_no_sync)


def _around_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        modes.current().after_engine_backward(self)
        return result

    return backward


def _around_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = modes.current()
        mode.before_engine_step(self)
        result = original(self, *args, **kwargs)
        mode.after_engine_step(self)
        return result

    return step


def _around_no_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    def no_sync(self: Any) -> Any:
        return modes.current().engine_without_sync(original, self)

    return no_sync
