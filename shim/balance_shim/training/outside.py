"""Modules of a trainer outside of the placed model: custom heads, prompt encoders, modules in attributes.

Scripts and PEFT make such modules at `model.device`, or where the first parameter is. The former is the first device
(`seams/model_device.py`), where inputs arrive and outputs return; under a balanced map the latter need not be. PEFT's
prompt encoders are computed together with the embedding's output, so they follow it; all else is on the first device.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import copies, log
from ..errors import MoveError
from ..map_file import DeviceMap
from ..placement import placed_models
from ..placement.move import Moved, move
from ..units import counted
from ..upstream.model_ends import input_embedding
from ..upstream.trainer import TrainerLike

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROMPTS = "prompt_encoder"  # of a `peft.PeftModel` with prompt learning


def arrange(trainer: TrainerLike, model: "nn.Module") -> None:
    """Bring modules that were made where the embedding is, except prompts, to the first device; log it.

    Args:
        trainer: a `transformers.Trainer` about to train.
        model: what was placed: the trainer's model, or one inside of it.
    """
    made_at = _device_of_embedding(model)
    tensors = _direct_tensors(_modules(trainer, model), model)
    # TRL's models with a value head (0.x) bring outputs to the device of that head, wherever it is.
    first = trainer.args.device
    if made_at in (None, first) or not tensors or getattr(trainer.model, "is_sequential_parallel", False):
        return
    moving = [tensor for tensor in tensors if tensor.device == made_at]
    if moving:
        _put(moving, first, _optimizers(trainer))
        log.info(
            f"{counted(len(moving), 'tensor')} that the script has made where the embedding is moved to {first}, where "
            "inputs arrive and outputs return"
        )


def move_along(trainer: TrainerLike, model: "nn.Module", device_map: DeviceMap) -> Moved:
    """Move the blocks of `model` as `placement.move` does, with the optimizer's state, and prompts with the embedding.

    Raises:
        MoveError: as `move` does; blocks and prompts are where they were.
        LostModelError: as `move` does.
    """
    before, optimizers = _device_of_embedding(model), _optimizers(trainer)
    old_map = dict(getattr(model, "hf_device_map", None) or {})
    prompts = [tensor for tensor in _direct_tensors(_prompts(trainer.model), model) if tensor.device == before]
    moved = move(model, device_map, optimizers)
    goal = _device_of_embedding(model)
    if prompts and goal is not None and goal != before:
        try:
            _put(prompts, goal, optimizers)
        except Exception as error:
            assert before is not None, "prompts were found on it"
            _put(prompts, before, optimizers)
            move(model, old_map, optimizers)
            raise MoveError(f"prompts cannot follow the embedding: {error}") from error
    return moved


def _optimizers(trainer: TrainerLike) -> list[Any]:
    optimizer = getattr(trainer, "optimizer", None)
    return [] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)]


def _device_of_embedding(model: "nn.Module") -> "torch.device | None":
    """Return the device of the input embedding, which is `model.device` for models of transformers; None: no weight."""
    weight = getattr(input_embedding(model), "weight", None)
    weight = next(model.parameters(), None) if weight is None else weight
    return None if weight is None else weight.device


def _prompts(model: "nn.Module") -> "list[nn.Module]":
    """Return the modules of the prompt encoders of a model that PEFT has wrapped."""
    encoders = getattr(model, "_modules", {}).get(PROMPTS)
    return [] if encoders is None else list(encoders.modules())


def _modules(trainer: TrainerLike, model: "nn.Module") -> "list[nn.Module]":
    """Return the modules outside of `model`: around it, and in attributes of the trainer.

    Other models with a map are not among them, and neither are prompts.
    """
    from torch import nn

    passed = {id(prompt) for prompt in _prompts(trainer.model)}
    passed |= {id(module) for one in placed_models.compared_models() for module in one.modules()}
    modules: list[nn.Module] = []
    for outer in (
        trainer.model,
        *(attribute for attribute in vars(trainer).values() if isinstance(attribute, nn.Module)),
    ):
        if outer is trainer.model or not placed_models.has_map(outer):
            modules += [module for module in outer.modules() if id(module) not in passed]
            passed |= {id(module) for module in modules}
    return modules


def _direct_tensors(modules: "Iterable[nn.Module]", model: "nn.Module") -> "list[Tensor]":
    """Return the parameters and buffers that `modules` have themselves and `model` does not have."""
    inside = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    return [tensor for tensor in own if tensor is not None and id(tensor) not in inside]


def _put(tensors: "Iterable[Tensor]", device: "torch.device", optimizers: Iterable[Any]) -> None:
    """Move tensors with their gradients and optimizer state; they stay the objects that they are."""
    import torch

    for tensor in tensors:
        old = tensor.device
        state = [value for optimizer in optimizers for value in optimizer.state.get(tensor, {}).values()]
        for attached in (tensor, tensor.grad, *state):
            # Adam keeps its count of steps on the host.
            if isinstance(attached, torch.Tensor) and attached.device == old:
                attached.data = copies.moved(attached.data, device)
