"""The two ends of a model as its class declares them: the embedding of the inputs, and the head that makes logits."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def input_embedding(model: "nn.Module") -> "nn.Module | None":
    """Return the module that embeds the tokens; None where the class declares none."""
    return _declared(model, "get_input_embeddings")


def output_head(model: "nn.Module") -> "nn.Module | None":
    """Return the module that makes the logits; None where the class declares none."""
    return _declared(model, "get_output_embeddings")


def _declared(model: "nn.Module", getter: str) -> "nn.Module | None":
    from torch import nn

    declared = getattr(model, getter, None)
    try:
        end = declared() if callable(declared) else None
    except (AttributeError, NotImplementedError, TypeError):  # from classes of transformers without such a module
        return None
    return end if isinstance(end, nn.Module) else None
