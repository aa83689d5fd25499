"""Models inside of modules of another kind: a wrapper of the script's own, sentence-transformers, setfit.

The Trainer takes a model to span several devices if it has `hf_device_map`. A wrapper has none, so the Trainer brings
it to the first device whole, and no map is left of the model inside.
"""

from inspect import signature
from typing import TYPE_CHECKING, Any

from .. import log
from ..placement import placed_models
from ..replicas import ranks
from ..upstream.trainer import TrainingArgumentsLike

if TYPE_CHECKING:
    from torch import nn


def keep_map(model: "nn.Module", arguments: TrainingArgumentsLike | None) -> None:
    """Have the Trainer leave the model inside of `model` on its devices, and the modules around it on the first one.

    Args:
        model: what a trainer is given, before it looks at it.
        arguments: its `TrainingArguments`.
    """
    if not hasattr(model, "modules") or getattr(model, "hf_device_map", None) is not None:
        return
    placed = placed_models.placed(model)
    if placed is None or arguments is None or not (arguments.world_size == 1 or ranks.has_own_devices()):
        return
    inner = placed[0]
    device_map = getattr(inner, "hf_device_map", None)
    if not device_map or len(set(device_map.values())) < 2:
        return
    inside = {id(tensor) for tensor in (*inner.parameters(), *inner.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside and tensor.device.type != "meta":
            tensor.data = tensor.data.to(arguments.device)  # where the Trainer would bring all of it
    model.hf_device_map = device_map  # the same dict: blocks may move
    log.info(
        f"{type(model).__name__} has no device map of its own; the {type(inner).__name__} inside it stays on its "
        f"{len(set(device_map.values()))} devices, the modules around it are on {arguments.device}"
    )


def keep_given_map(init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do so for the model that a trainer is made with.

    Args:
        init: `Trainer.__init__`, with the arguments that it is called with (`self` first).
    """
    bound = signature(init).bind_partial(*args, **kwargs).arguments
    if bound.get("model") is not None:
        keep_map(bound["model"], bound.get("args"))
