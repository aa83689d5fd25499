"""`axolotl.train`: the model is saved by all ranks if axolotl's own config names DeepSpeed, else by the first alone."""

from collections.abc import Callable
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text

_NAME = "save_trained_model"


def apply(module: Any) -> None:
    """Patch `axolotl.train`.

    Raises:
        SeamMoved: this version saves the model somewhere else.
    """
    if not callable(getattr(module, _NAME, None)):
        raise SeamMoved(f"{module.__name__}.{_NAME}", version_text("axolotl"))
    registry.replace(module, _NAME, _around_save)


def _around_save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_trained_model(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        before = cfg.deepspeed
        engine_config = None if before else modes.current().engine_config(trainer)
        if engine_config is None:
            return original(cfg, trainer, *args, **kwargs)
        cfg.deepspeed = engine_config
        try:
            return original(cfg, trainer, *args, **kwargs)
        finally:
            cfg.deepspeed = before

    return save_trained_model
