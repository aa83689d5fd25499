"""Activation checkpointing layer by layer, whatever this version of transformers calls its switches."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import log
from ..memory.blocks import chain
from ..placement.plan import Plan
from ..versions import version_of

RENAMED_SINCE = (5, 23)  # the old names warn


def arrange(trainer: Any, model: Any, plan: Plan) -> None:
    """Have the layers that `plan` names recomputed, and no others, from the moment when training has been set up.

    Not before: the Trainer switches checkpointing on for all layers while it sets up, if its arguments say so.
    """
    layers = _layers(model)
    everything = frozenset(layers) if plan.workload.gradient_checkpointing else frozenset()
    wanted = everything if plan.recomputed is None else plan.recomputed
    if not getattr(model, "supports_gradient_checkpointing", False):
        if wanted:
            log.warning(f"{type(model).__name__} does not support activation checkpointing; nothing is recomputed")
        return
    from transformers import TrainerCallback

    class Arranging(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            recompute_only(model, wanted)

    trainer.add_callback(Arranging())
    if plan.recomputed is not None:
        log.info(
            f"{len(wanted)} of {len(layers)} layers are recomputed in the backward pass, which is what it takes to fit"
        )


def recompute_only(model: Any, wanted: frozenset[str]) -> None:
    """Switch checkpointing on for the layers named in `wanted` and off for all others."""
    word = "activation" if version_of("transformers") >= RENAMED_SINCE else "gradient"
    if not wanted:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    if not _is_on(model):
        # Without re-entrance inputs need no gradients, so frozen embeddings need no hooks.
        options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{word}_checkpointing_enable")(**options)
    named = dict(model.named_modules())
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
