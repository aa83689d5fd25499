"""`BALANCE_GRADIENT_CHECKPOINTING`: activations recomputed in all layers, in none, or in those that a plan names.

All and none are put into the `TrainingArguments` too, so that models which the shim has not placed, and ZeRO-3, have
them. Single layers are switched by whatever name this version of transformers has for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import log, state
from ..memory.blocks import chain
from ..placement.plan import Plan
from ..seams.guard import attempt
from ..versions import version_of

RENAMED_SINCE = (5, 23)  # the old names warn


def adjust_arguments(arguments: Any) -> None:
    """Put `1` or `0` into `TrainingArguments` that are being made; how it is done stays what the script says."""
    wish = state.settings().gradient_checkpointing
    if not isinstance(wish, bool):
        return
    _switch(arguments, wish)
    if wish and options_of(arguments) is None:
        # Without re-entrance inputs need no gradients, so frozen embeddings need no hooks.
        setattr(arguments, f"{_names(arguments)[0]}_kwargs", {"use_reentrant": False})


def options_of(arguments: Any) -> Any:
    """Return what `arguments` have for `torch.utils.checkpoint.checkpoint`; None: nothing."""
    options = (getattr(arguments, f"{name}_kwargs", None) for name in _names(arguments))
    return next((each for each in options if each is not None), None)


def _switch(arguments: Any, on: bool) -> None:
    setattr(arguments, _names(arguments)[0], on)


def _names(arguments: Any) -> tuple[str, ...]:
    """Return what the switch is called in `arguments`: the name that counts, then one that it had before."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return tuple(name for name in names if hasattr(arguments, name))


def is_supported(model: Any) -> bool:
    """Whether layers of `model` can be recomputed."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def arrange(trainer: Any, model: Any, plan: Plan | None) -> None:
    """Have the layers recomputed that are to be, and no others, from the moment when training has been set up.

    Not before: the Trainer switches checkpointing on for all layers while it sets up, if its arguments say so.

    Args:
        model: the trainer's, or the one inside of it that is the library's.
        plan: names the layers where they were chosen one by one; None for a model that the shim has not placed.
    """
    wish = state.settings().gradient_checkpointing
    chosen = None if plan is None else plan.recomputed
    if wish is None:
        return
    if not is_supported(model):
        if wish is True or chosen:
            _switch(trainer.args, False)  # the Trainer would stop
            log.warning(f"{type(model).__name__} does not support activation checkpointing; nothing is recomputed")
        return
    if wish == "auto" and chosen is None:
        log.once(
            "info",
            "BALANCE_GRADIENT_CHECKPOINTING=auto acts where the shim makes the map, which it has not for this model; "
            "it trains as the script says",
        )
        return
    layers = _layers(model)
    if wish is True and not layers:
        return  # what the arguments say has to do
    wanted = (frozenset(layers) if wish is True else frozenset()) if chosen is None else chosen
    from transformers import TrainerCallback

    class Arranging(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            what, options = "choosing the layers to recompute", options_of(args)
            attempt(what, recompute_only, model, wanted, options, instead="it stays as it was")

    before = vars(trainer).pop("_balance_shim_arranging", None)
    if before is not None:  # it trains again
        trainer.remove_callback(before)
    trainer._balance_shim_arranging = Arranging()
    trainer.add_callback(trainer._balance_shim_arranging)
    if chosen is not None:
        log.info(
            f"{len(wanted)} of {len(layers)} layers are recomputed in the backward pass, which is what it takes to fit"
        )


def recompute_only(model: Any, wanted: frozenset[str], options: dict[str, Any] | None = None) -> None:
    """Switch checkpointing on for the layers named in `wanted` and off for all others.

    Args:
        options: of `torch.utils.checkpoint.checkpoint`; by default without re-entrance.
    """
    word = "activation" if version_of("transformers") >= RENAMED_SINCE else "gradient"
    if not wanted:
        if _is_on(model):  # classes that only claim to support it refuse to switch it off
            getattr(model, f"{word}_checkpointing_disable")()
        return
    options = options or {"use_reentrant": False}
    if not _is_on(model):
        getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options})
    if options.get("use_reentrant", True) and not _embeddings_train(model):
        model.enable_input_require_grads()  # re-entrance has no gradients where no input of a layer wants any
    named = dict(model.named_modules(remove_duplicate=False))
    layers = _layers(model)
    chosen = {id(named[name]) for name in wanted}
    for name in layers:
        layer = named[name]
        if "gradient_checkpointing" in vars(layer) or hasattr(type(layer), "gradient_checkpointing"):
            layer.gradient_checkpointing = name in wanted
    for module in named.values():  # up to 4.52 the module around the layers has the switch
        if getattr(module, "gradient_checkpointing", False) is True and not _is_layer(module, layers, named):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = _selecting(function, chosen, {id(named[name]) for name in layers})


def _selecting(function: Callable[..., Any], chosen: set[int], layers: set[int]) -> Callable[..., Any]:
    """Return the checkpoint function that just calls what belongs to a layer that is not chosen."""
    function = getattr(function, "for_all_layers", function)  # of the choice before

    def checkpoint(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer_call = call.func if isinstance(call, partial) else call
        owner = id(getattr(layer_call, "__self__", None))
        if owner in layers and owner not in chosen:
            return call(*args, **kwargs)
        return function(call, *args, **kwargs)

    checkpoint.for_all_layers = function  # type: ignore[attr-defined]
    return checkpoint


def _layers(model: Any) -> list[str]:
    return [
        block.name
        for block in chain(model)
        if block.role in ("layer", "tower") and block.name.rpartition(".")[2].isdigit()
    ]


def _is_layer(module: Any, layers: list[str], named: dict[str, Any]) -> bool:
    return any(named[name] is module for name in layers)


def _is_on(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _embeddings_train(model: Any) -> bool:
    return any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
