"""`BALANCE_GRADIENT_CHECKPOINTING`: activations recomputed in all layers, in none, or in those that a plan names.

All and none are put into the `TrainingArguments` too, so that models which the shim has not placed, and ZeRO-3, have
them.
"""

from typing import TYPE_CHECKING, Any

from .. import log, state
from ..memory.recomputation import is_supported, recomputable_layers, recompute_only
from ..patching.guard import attempt
from ..placement.plan import Plan
from ..training_run import Part
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike
from .checkpoint_inputs import send_inputs_first

if TYPE_CHECKING:
    from torch import nn


def adjust_arguments(arguments: TrainingArgumentsLike) -> None:
    """Put `1` or `0` into `TrainingArguments` that are being made; the method stays that of the script."""
    setting = state.settings().gradient_checkpointing
    if not isinstance(setting, bool):
        return
    _switch(arguments, setting)
    if setting and options_of(arguments) is None:
        # Without re-entrance inputs need no gradients, so frozen embeddings need no hooks.
        setattr(arguments, f"{_names(arguments)[0]}_kwargs", {"use_reentrant": False})


def options_of(arguments: TrainingArgumentsLike) -> Any:
    """Return the options of `arguments` for `torch.utils.checkpoint.checkpoint`; None if there are none."""
    options = (getattr(arguments, f"{name}_kwargs", None) for name in _names(arguments))
    return next((candidate for candidate in options if candidate is not None), None)


def _switch(arguments: TrainingArgumentsLike, on: bool) -> None:
    setattr(arguments, _names(arguments)[0], on)


def _names(arguments: TrainingArgumentsLike) -> tuple[str, ...]:
    """Return the names of the switch in `arguments`: the name that counts, then one that it had before."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return tuple(name for name in names if hasattr(arguments, name))


def switch_off_unsupported(trainer: TrainerLike, model: "nn.Module") -> None:
    """Take checkpointing that only `BALANCE_GRADIENT_CHECKPOINTING` asks for off a trainer of a model without it."""
    if state.settings().gradient_checkpointing is True and not is_supported(model):
        _switch(trainer.args, False)  # the Trainer would stop


def arrange(trainer: TrainerLike, model: "nn.Module", plan: Plan | None) -> None:
    """Have the layers recomputed that are to be, and no others, from the moment when training has been set up.

    Not before: the Trainer switches checkpointing on for all layers while it sets up, if its arguments ask for it.

    Args:
        model: the trainer's, or the one inside of it that is the library's.
        plan: names the layers where they were chosen one by one; None for a model that the shim has not placed.
    """
    layers = _wanted(trainer, model, plan)
    if layers is None and plan is None:
        return
    from transformers import TrainerCallback

    class Arranging(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if layers is not None:
                action, options = "choosing the layers to recompute", options_of(args)
                attempt(action, recompute_only, model, layers, options, instead="it stays as it was")
            if plan is not None:
                instead = "dropout in the first layer of a device may be recomputed with another mask"
                attempt("sending inputs ahead of checkpoints", send_inputs_first, model, instead=instead)

    trainer.add_callback(_CALLBACK.keep(trainer, Arranging()))


def _end(trainer: TrainerLike, callback: Any) -> None:
    trainer.remove_callback(callback)


_CALLBACK: Part[Any] = Part("activation checkpointing", _end, instead="its callback stays")


def _wanted(trainer: TrainerLike, model: "nn.Module", plan: Plan | None) -> frozenset[str] | None:
    """Return the names of the layers to recompute; None: as the script and its arguments set it."""
    setting = state.settings().gradient_checkpointing
    chosen = None if plan is None else plan.recomputed
    if setting is None:
        return None
    if not is_supported(model):
        if setting is True or chosen:
            _switch(trainer.args, False)  # the Trainer would stop
            log.warning(f"{type(model).__name__} does not support activation checkpointing; nothing is recomputed")
        return None
    if setting == "auto" and chosen is None:
        log.once(
            "info",
            "BALANCE_GRADIENT_CHECKPOINTING=auto needs a map made by the shim, which this model does not have; "
            "the script decides",
        )
        return None
    layers = recomputable_layers(model)
    if setting is True and not layers:
        return None  # the arguments decide
    names = (frozenset(layers) if setting is True else frozenset()) if chosen is None else chosen
    if plan is not None and chosen is not None:
        _say(plan, chosen, len(layers))
    return names


def choose_again(trainer: TrainerLike, model: "nn.Module", before: Plan, plan: Plan) -> None:
    """Have the layers of `plan` recomputed in place of those of the plan before, between two steps of a training."""
    if plan.recomputed is None or plan.recomputed == before.recomputed or not is_supported(model):
        return
    recompute_only(model, plan.recomputed, options_of(trainer.args))
    send_inputs_first(model)
    _say(plan, plan.recomputed, len(recomputable_layers(model)))


def _say(plan: Plan, chosen: frozenset[str], layers: int) -> None:
    enough = "as many as possible" if plan.shortfall else "as few as fit"
    log.info(f"{len(chosen)} of {layers} layers are recomputed in the backward pass, {enough}")
