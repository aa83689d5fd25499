"""`accelerate.accelerator`: how models are prepared for several processes, in a Trainer and in loops without one."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `accelerate.accelerator`.

    Raises:
        SeamMoved: this version has no such class, or it clips elsewhere.
    """
    accelerator = getattr(module, "Accelerator", None)
    for name in ("__init__", "prepare", "prepare_model", "clip_grad_norm_", "clip_grad_value_"):
        if not callable(getattr(accelerator, name, None)):
            raise SeamMoved(f"accelerate.Accelerator.{name}", version_text("accelerate"))
    registry.replace(accelerator, "__init__", _around_init)
    registry.replace(accelerator, "prepare", _around_prepare)
    registry.replace(accelerator, "prepare_model", _around_prepare_model)
    registry.replace(accelerator, "clip_grad_norm_", _around_clip_norm)
    registry.replace(accelerator, "clip_grad_value_", _around_clip_value)


def _around_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **modes.current().accelerator_options(kwargs))

    return __init__


def _around_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().preparing(args):
            return original(self, *args, **kwargs)

    return prepare


def _around_prepare_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        return modes.current().prepare_model(original, self, args, kwargs)

    return prepare_model


def _around_clip_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        modes.current().before_clipping_norm(self, max_norm)
        return original(self, parameters, max_norm, *args, **kwargs)

    return clip_grad_norm_


def _around_clip_value(original: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grad_value_(self: Any, *args: Any, **kwargs: Any) -> Any:
        modes.current().before_clipping_value(self)
        return original(self, *args, **kwargs)

    return clip_grad_value_
