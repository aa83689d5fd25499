"""Inputs of checkpointed layers reach the layer's device before the checkpoint notes the state of random numbers.

Each CUDA device has a generator of its own. `torch.utils.checkpoint` saves and restores those of the devices on which
it finds arguments, and cannot know of moves inside, as its documentation has it. Where transformers checkpoints around
accelerate's hook (4.x, and 5.x before `GradientCheckpointingLayer` wraps `forward`), the first layer of each device
gets its arguments from the device before: dropout in it would be recomputed with another mask, and its gradients would
be wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any


def send_inputs_first(model: Any) -> None:
    """Have the checkpoint function of each module in `model` send hidden states to where the layer runs.

    To be called when checkpointing has been switched on; again is harmless. Where the arguments are on their device
    already nothing is done.
    """
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, SendingCheckpoint):
            module._gradient_checkpointing_func = SendingCheckpoint(function)


class SendingCheckpoint:
    """A checkpoint function that sends hidden states first. No closure, so that a model with it can be pickled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        # What `recompute_only` looks for when it chooses other layers.
        self.for_all_layers = getattr(function, "for_all_layers", function)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._function(call, *_sent(args, _device_of(call)), **kwargs)


def _sent(args: tuple[Any, ...], device: Any) -> tuple[Any, ...]:
    """Return the arguments with the first tensor, the hidden states, on `device`.

    The others (masks, positions) stay: a copy of each would be kept for each layer, and their device's state is saved
    beside that of `device`, which does no harm.
    """
    import torch

    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            if device is None or value.device == device or value.device.type != device.type:
                return args
            return (*args[:position], value.to(device), *args[position + 1 :])
    return args


def _device_of(call: Callable[..., Any]) -> Any:
    """Return the device to which accelerate's hook sends the inputs of the layer that `call` runs; None: unknown."""
    import torch

    layer = _layer_of(call)
    hook = None if layer is None else vars(layer).get("_hf_hook")
    for attached in getattr(hook, "hooks", (hook,)):
        place = getattr(attached, "execution_device", None)
        if place is not None:
            if isinstance(place, int):  # a number means the kind of accelerator that is here
                kind = next((value.device.type for value in layer.parameters()), "cpu")
                return torch.device(kind, place)
            return torch.device(place)
    return None


def _layer_of(call: Callable[..., Any]) -> Any:
    """Return the module that `call` runs: its method, its `forward` as accelerate replaces it, or a closure over it."""
    import torch

    candidates: list[Any] = []
    while isinstance(call, partial):
        candidates += call.args[:1]
        call = call.func
    candidates.append(getattr(call, "__self__", None))
    candidates += [cell.cell_contents for cell in getattr(call, "__closure__", None) or () if _is_set(cell)]
    return next((candidate for candidate in candidates if isinstance(candidate, torch.nn.Module)), None)


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises while the name has no value yet
    except ValueError:
        return False
    return True
