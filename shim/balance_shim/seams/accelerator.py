"""`accelerate.accelerator`: a loop of the script's own, without a Trainer, gets DeepSpeed and its config for ZeRO-3."""

from collections.abc import Callable
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: Any) -> None:
    """Patch `accelerate.accelerator`.

    Raises:
        SeamMoved: this version has no such class, or it clips elsewhere.
    """
    accelerator = getattr(module, "Accelerator", None)
    for name in ("__init__", "clip_grad_norm_", "clip_grad_value_"):
        if not callable(getattr(accelerator, name, None)):
            raise SeamMoved(f"accelerate.Accelerator.{name}", version_text("accelerate"))
    registry.replace(accelerator, "__init__", _around_init)
    registry.replace(accelerator, "clip_grad_norm_", _around_clip_norm)
    registry.replace(accelerator, "clip_grad_value_", _around_clip_value)


def _around_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **modes.current().accelerator_options(kwargs))

    return __init__


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
