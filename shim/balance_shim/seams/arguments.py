"""Seam 2a, `transformers.training_args`: `TrainingArguments` say much of the workload, often before the model loads."""

from collections.abc import Callable
from typing import Any

from ..versions import version_text
from . import known, registry
from .guard import SeamMoved, attempt


def apply(module: Any) -> None:
    """Patch `transformers.training_args`.

    Raises:
        SeamMoved: this version makes its arguments another way.
    """
    if not callable(getattr(getattr(module, "TrainingArguments", None), "__post_init__", None)):
        raise SeamMoved("transformers.TrainingArguments.__post_init__", version_text("transformers"))
    registry.replace(module.TrainingArguments, "__post_init__", _around_post_init)


def _around_post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        attempt("recording the TrainingArguments", known.remember_arguments, self)
        return result

    return __post_init__
