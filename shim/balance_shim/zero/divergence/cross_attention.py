"""Language models with cross-attention to pictures (Mllama), whose batches have pictures on some ranks only.

Such a model skips its vision tower and its cross-attention layers where a batch has no picture, while the other ranks
gather their weights. A rank without pictures gets made ones here, so that it runs the same modules in the same order,
and the outputs of its cross-attention layers are dropped: each layer returns its input. Values are those of a model
that skips the layers, and gradients of zero come to all that ran, as `towers.py` explains.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ... import log
from . import modality_sync

if TYPE_CHECKING:
    from torch import nn

# The entries of a batch with pictures, by the names of the forward's parameters; the first is the picture itself.
PARTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
MASK = "cross_attention_mask"


def accompany(model: Any) -> list[Any]:
    """Have every rank run the layers that some rank needs for its pictures; return the hooks that do so.

    Empty where `model` has no layers that it skips without pictures.
    """
    layers = [
        module.layers[index]
        for module in model.modules()
        if isinstance(getattr(module, "cross_attention_layers", None), list) and hasattr(module, "layers")
        for index in module.cross_attention_layers
    ]
    parameters = inspect.signature(model.forward).parameters
    if not layers or not {*PARTS, MASK} <= set(parameters):
        return []
    skipping = _Skipping(model, layers)
    return [
        model.register_forward_pre_hook(skipping.before_model, with_kwargs=True),
        *(layer.register_forward_hook(skipping.after_layer) for layer in layers),
    ]


class _Skipping:
    """Whether the present batch of this rank has dummy pictures, and the pictures that they are made like."""

    def __init__(self, model: "nn.Module", layers: list[Any]) -> None:
        self.made = False
        self.latest: dict[str, Any] = {}  # the smallest pictures of the latest batch that had some, alike on all ranks
        skipped = (parameter for layer in layers for parameter in layer.parameters())
        self.trains = modality_sync.trains_beside_text(model) or any(parameter.requires_grad for parameter in skipped)

    def before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the batch dummy pictures, if another rank's has some and this one's has not. Ranks do this together."""
        import torch.distributed as dist

        own_pictures = modality_sync.described(kwargs, PARTS) if kwargs.get(PARTS[0]) is not None else {}
        of_all: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_all, own_pictures)
        pictures = [described for described in of_all if described]
        if 0 < len(pictures) < len(of_all):
            log.once("info", "some ranks have batches without pictures; they use dummy ones and discard the result")
        if pictures:
            self.latest = min(pictures, key=modality_sync.size)
        # Also where no rank has any: what gets no gradient would be trained with an earlier one's.
        stale = bool(self.latest) and self.trains and module.training
        text = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        self.made = not own_pictures and text is not None and (bool(pictures) or stale)
        if not self.made:
            return None
        return args, {**kwargs, **_made(self.latest, text)}

    def after_layer(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Return the layer's input, where its pictures are dummies."""
        del module
        if not self.made:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        dropped = modality_sync.with_nothing_added(args[0], [hidden])
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped


def _made(pictures: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """Return one dummy picture for each sequence in `text` (sequences x tokens), which all its tokens may look at."""
    import torch

    batch_size, tokens = text.shape[:2]
    dummies = {name: modality_sync.made(value, text.device) for name, value in pictures.items()}
    dummies = {name: tensor[:1].expand(batch_size, *tensor.shape[1:]) for name, tensor in dummies.items()}
    images, tiles = dummies[PARTS[0]].shape[1:3]
    dummies[MASK] = torch.ones(batch_size, tokens, images, tiles, dtype=torch.long, device=text.device)
    return dummies
