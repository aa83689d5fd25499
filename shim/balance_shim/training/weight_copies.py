"""Tensors that a script keeps next to the parameters of a placed model, which would not move with them."""

import gc
from typing import Any

from .. import devices
from ..monitoring import leak_search
from ..placement import placed_models
from ..replicas import together
from ..upstream.trainer import TrainerLike


def has_parts_on(index: int, trained: Any, placed: Any) -> bool:
    """Return whether `trained` has parameters outside of `placed` on a device: a head, PEFT's prompt encoder.

    Args:
        index: of that device.
        trained: the trainer's model.
        placed: the model that a plan has placed: `trained`, or one inside of it.
    """
    if trained is placed:
        return False
    kind, inside = devices.accelerator_type(), {id(parameter) for parameter in placed.parameters()}
    return any(
        parameter.device.type == kind and parameter.device.index == index
        for parameter in trained.parameters()
        if id(parameter) not in inside
    )


def reason_to_stay(trainer: TrainerLike) -> str:
    """Return why no block of the model of `trainer` may move; "" where nothing speaks against it.

    Another model of the script's that has a device map (a reference model) has the same shapes by its nature; what
    is computed of both comes from their outputs.
    """
    if together.is_wrapped(getattr(trainer, "model_wrapped", None)):
        return "its parameters are in the buckets of DistributedDataParallel"
    kind = devices.accelerator_type()
    if kind is None:
        return ""
    gc.collect()  # hooks make cycles, so an earlier model may still be there
    excluded = {
        id(tensor) for model in placed_models.compared_models() for tensor in (*model.parameters(), *model.buffers())
    }
    copies = [
        tensor for tensor in leak_search.twins(kind, trainer.model, trainer.optimizer) if id(tensor) not in excluded
    ]
    if not copies:
        return ""
    shape, place = "x".join(map(str, copies[0].shape)), copies[0].device
    return (
        f"{len(copies)} tensors with the shapes of parameters (one of {shape} on {place}) are held elsewhere and would "
        "not move along"
    )
