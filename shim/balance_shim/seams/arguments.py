"""Seam 2a, `transformers.training_args`: `TrainingArguments` say much of the workload, often before the model loads."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import devices, modes, state
from ..patching import registry
from ..patching.guard import SeamMoved
from ..upstream.trainer import TrainingArgumentsLike
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `transformers.training_args`.

    Raises:
        SeamMoved: this version makes its arguments another way.
    """
    if not callable(getattr(getattr(module, "TrainingArguments", None), "__post_init__", None)):
        raise SeamMoved("transformers.TrainingArguments.__post_init__", version_text("transformers"))
    registry.replace(module.TrainingArguments, "__post_init__", _around_post_init)
    if callable(getattr(module, "is_torch_bf16_gpu_available", None)):
        registry.replace(module, "is_torch_bf16_gpu_available", _around_bf16_check)
    modes.current().training_is_near()


def _around_post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: TrainingArgumentsLike, *args: Any, **kwargs: Any) -> Any:
        state.raise_pending()
        mode = modes.current()
        mode.before_arguments(self)
        result = original(self, *args, **kwargs)
        mode.after_arguments(self)
        return result

    return __post_init__


def _around_bf16_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def is_torch_bf16_gpu_available(*args: Any, **kwargs: Any) -> Any:
        # bf16 without an accelerator is refused unless the script says use_cpu.
        accepted = modes.current().allows_bf16_on_cpu()
        return original(*args, **kwargs) or (accepted and devices.accelerator_type() is None)

    return is_torch_bf16_gpu_available
