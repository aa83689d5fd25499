"""The layers of a model that recompute their activations: all, none, or some.

Single layers are switched by whatever name this version of transformers has for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..upstream.model_ends import input_embedding
from ..versions import version_of
from .blocks import Block, chain

if TYPE_CHECKING:
    from torch import nn

RENAMED_SINCE = (5, 23)  # the old names warn


def is_supported(model: "nn.Module") -> bool:
    """Whether layers of `model` can be recomputed."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def recomputable_layers(model: "nn.Module") -> list[str]:
    """Return the names of the layers that can be recomputed each by itself."""
    return [block.name for block in chain(model) if can_be_recomputed(block)]


def can_be_recomputed(block: Block) -> bool:
    """Whether the block is a layer of a list, which models recompute or not, each by itself."""
    return block.role in ("layer", "tower") and block.name.rpartition(".")[2].isdigit()


def recompute_only(
    model: Any, names: frozenset[str], options: dict[str, Any] | None = None, layers: Sequence[str] | None = None
) -> None:
    """Switch checkpointing on for the layers in `names` and off for all other layers.

    Args:
        options: of `torch.utils.checkpoint.checkpoint`; by default without re-entrance.
        layers: the names of all layers; by default those that the model has.
    """
    prefix = "activation" if version_of("transformers") >= RENAMED_SINCE else "gradient"
    if not names:
        if _is_on(model):  # classes that only claim to support it refuse to switch it off
            getattr(model, f"{prefix}_checkpointing_disable")()
        return
    options = options or {"use_reentrant": False}
    if not _is_on(model):
        getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": options})
    if options.get("use_reentrant", True) and not _embeddings_train(model):
        model.enable_input_require_grads()  # re-entrance has no gradients where no input of a layer wants any
    named = dict(model.named_modules(remove_duplicate=False))
    layers = recomputable_layers(model) if layers is None else layers
    chosen = {id(named[name]) for name in names}
    for name in layers:
        layer = named[name]
        if "gradient_checkpointing" in vars(layer) or hasattr(type(layer), "gradient_checkpointing"):
            layer.gradient_checkpointing = name in names
    for module in named.values():  # up to 4.52 the module around the layers has the switch
        if getattr(module, "gradient_checkpointing", False) is True and not _is_layer(module, layers, named):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = _selecting(function, chosen, {id(named[name]) for name in layers})


def _selecting(function: Callable[..., Any], chosen: set[int], layers: set[int]) -> Callable[..., Any]:
    """Return a checkpoint function that calls functions of layers that are not chosen without checkpointing."""
    function = getattr(function, "for_all_layers", function)  # of the choice before

    def checkpoint(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer_call = call.func if isinstance(call, partial) else call
        owner = id(getattr(layer_call, "__self__", None))
        if owner in layers and owner not in chosen:
            return call(*args, **kwargs)
        return function(call, *args, **kwargs)

    checkpoint.for_all_layers = function  # type: ignore[attr-defined]
    return checkpoint


def _is_layer(module: Any, layers: Sequence[str], named: dict[str, Any]) -> bool:
    return any(named[name] is module for name in layers)


def _is_on(model: "nn.Module") -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _embeddings_train(model: "nn.Module") -> bool:
    embedding = input_embedding(model)
    return embedding is not None and any(parameter.requires_grad for parameter in embedding.parameters())
