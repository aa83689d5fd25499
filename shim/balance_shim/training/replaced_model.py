"""`Trainer(model_init=...)` and hyperparameter search: each training has a new model, which replaces the one before."""

import gc
from typing import TYPE_CHECKING

from .. import devices
from ..upstream.trainer import TrainerLike
from .held import held_by

if TYPE_CHECKING:
    from torch import nn


def leaving(trainer: TrainerLike, model: "nn.Module") -> dict[int, int]:
    """Return device index -> bytes that go with `model`, the trainer's until now (or None), when another has come."""
    if model is None or devices.accelerator_type() is None or not hasattr(model, "parameters"):
        return {}
    return held_by(model, getattr(trainer, "optimizer", None))


def let_go(trainer: TrainerLike) -> None:
    """Drop the references of `trainer` to a model that has been replaced, as its training loop would do in a moment."""
    import torch

    trainer.callback_handler.model = trainer.model
    trainer.callback_handler.optimizer = trainer.optimizer
    trainer.accelerator.free_memory()
    gc.collect()  # hooks make cycles
    kind = devices.accelerator_type()
    if kind is not None:
        torch.get_device_module(kind).empty_cache()
