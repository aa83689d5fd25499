"""Batches that have pictures on some ranks only: the other ranks run the tower on a dummy one and discard the result.

A tower's weights are gathered by all ranks together, so a rank whose batch has no picture would leave the others
waiting. It runs the tower where they do, right after the embedding, and adds nothing of the outcome. Values and
gradients stay what they are, and the backward pass comes through the tower too, with gradients of zero. That is done
also where no rank has a picture any more: what gets no gradient in a step would be trained with that of an earlier one,
which DeepSpeed (0.16 to 0.19) keeps in a buffer and fills only where there is a new one. (In such a step an optimizer
with momentum moves the tower, which one process would leave where it is.)
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import log
from ...errors import ZeroError
from ...patching.guard import insist
from ...training.actual_workload import innermost
from ...versions import version_of

if TYPE_CHECKING:
    from torch import nn

# Entry of a batch -> the method that makes features of it, whose parameters are named like the entries of a batch.
METHODS = {
    "pixel_values": "get_image_features",
    "pixel_values_videos": "get_video_features",
    "input_features": "get_audio_features",
}


NEUTRAL = 0.5  # of made pictures: Idefics and its like take those of zeros for padding, and throw them away


class Described(NamedTuple):
    """A tensor as other ranks get to know it; with its values only where those are whole numbers: sizes of pictures."""

    shape: tuple[int, ...]
    dtype: Any
    values: Any


def accompany(model: "nn.Module") -> list[Any]:
    """Have every rank run the towers of `model` that some rank runs; returns the hooks that see to it.

    None where its class has no method that runs a tower by itself.
    """
    base = innermost(model)
    methods = {part: method for part in METHODS if (method := _method(base, part)) is not None}
    if not methods:
        return []
    towers = _Towers(base, methods)
    embedding = base.get_input_embeddings()
    return [
        base.register_forward_pre_hook(towers.before_model, with_kwargs=True),
        embedding.register_forward_hook(towers.after_embedding),
    ]


class _Towers:
    """The towers that one rank runs besides those of its own batch in this forward pass."""

    def __init__(self, model: "nn.Module", methods: Mapping[str, Callable[..., Any]]) -> None:
        self.model, self.methods = model, methods
        self.known: dict[str, dict[str, Any]] = {}  # the latest of each part, the same on all ranks
        self.trains = trains_beside_text(model)
        self.missing: list[tuple[str, dict[str, Any]]] = []

    def before_model(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the entries that batches of other ranks have and this one has not. Ranks do this together."""
        del args
        import torch.distributed as dist

        own_entries = {part: self._described(part, kwargs) for part in self.methods if kwargs.get(part) is not None}
        everyones: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, own_entries)
        self.missing = []
        for part in self.methods:
            entries = [batch[part] for batch in everyones if part in batch]
            if entries:
                self.known[part] = min(entries, key=size)  # no more work than need be
            stale = part in self.known and self.trains and module.training
            if part not in own_entries and (entries or stale):
                self.missing.append((part, self.known[part]))
        if any(set(batch) != set(own_entries) for batch in everyones):
            log.once(
                "info",
                "some ranks have batches without pictures (or sound); they run the tower on dummy ones",
            )

    def after_embedding(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Run the tower for the missing entries, and return the embedding's output, unchanged in value."""
        del module, args
        missing, self.missing = self.missing, []
        return insist("running the tower for other ranks", self._add_nothing, output, missing) if missing else output

    def _add_nothing(self, output: Any, missing: list[tuple[str, dict[str, Any]]]) -> Any:
        for part, described in missing:
            features = self.methods[part](**{name: made(value, output.device) for name, value in described.items()})
            output = with_nothing_added(output, _used(features))
        return output

    def _described(self, part: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the method, in few bytes."""
        parameters = inspect.signature(self.methods[part]).parameters
        arguments = described(batch, parameters)
        for name, parameter in parameters.items():
            if batch.get(name) is None and parameter.default is parameter.empty and hasattr(self.model.config, name):
                arguments[name] = getattr(self.model.config, name)  # 4.x: the model passes the value of its config
        return arguments


def described(batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the tensors of `batch` that have `names`, in few bytes."""
    import torch

    result = {}
    for name in names:
        value = batch.get(name)
        if isinstance(value, torch.Tensor):
            values = None if value.is_floating_point() else value.tolist()
            result[name] = Described(tuple(value.shape), value.dtype, values)
    return result


def trains_beside_text(model: Any) -> bool:
    """Whether anything trains but the language model (the module with the input embedding) and its head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    parts = [model.get_submodule(name.rpartition(".")[0]), *([] if head is None else [head])]
    text = {id(parameter) for part in parts for parameter in part.parameters()}
    return any(parameter.requires_grad and id(parameter) not in text for parameter in model.parameters())


def _method(model: Any, part: str) -> Callable[..., Any] | None:
    method: Callable[..., Any] | None = getattr(model, METHODS[part], None)
    if method is not None:
        return method
    if part == "input_features":
        return _audio_method(model)
    if model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        return None
    visual = model.visual  # up to 4.51 the model's forward calls it itself

    def get_image_features(pixel_values: Any, image_grid_thw: Any) -> Any:
        return visual(pixel_values.type(visual.dtype), grid_thw=image_grid_thw)

    def get_video_features(pixel_values_videos: Any, video_grid_thw: Any) -> Any:
        return visual(pixel_values_videos.type(visual.dtype), grid_thw=video_grid_thw)

    return get_image_features if part == "pixel_values" else get_video_features


def _audio_method(model: Any) -> Callable[..., Any] | None:
    """Return a function that runs the sound modules of a model whose forward calls them itself (Qwen2-Audio)."""
    inner = next(
        (candidate for candidate in (model, getattr(model, "model", None)) if hasattr(candidate, "audio_tower")), None
    )
    if inner is None or model.config.model_type != "qwen2_audio":
        return None

    def get_audio_features(input_features: Any) -> Any:
        if version_of("transformers") < (5,):
            _ = inner.audio_tower.conv1.weight.dtype  # as its forward does, for which DeepSpeed gathers the weight
        return inner.multi_modal_projector(inner.audio_tower(input_features).last_hidden_state)

    return get_audio_features


def made(described: Any, device: Any) -> Any:
    """Return the tensor that is described, one value where its own are not known; anything else as it is."""
    import torch

    if not isinstance(described, Described):
        return described
    if described.values is None:
        return torch.full(described.shape, NEUTRAL, dtype=described.dtype, device=device)
    return torch.tensor(described.values, dtype=described.dtype, device=device)


def with_nothing_added(output: Any, tensors: list[Any]) -> Any:
    """Return `output`, from which gradients of zero go to `tensors`.

    Not zero times their sum: that of a half-precision tensor may be infinite.
    """
    import torch

    class AddsNothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: Any, *tensors: Any) -> Any:
            ctx.likes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
            return output.view_as(output)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)

    return AddsNothing.apply(output, *tensors)  # type: ignore[no-untyped-call]  # torch does not annotate it


def size(described: Mapping[str, Any]) -> int:
    return sum(math.prod(value.shape) for value in described.values() if isinstance(value, Described))


def _used(features: Any) -> list[Any]:
    """Return the tensors that a model takes from a tower; to use others would train what is not trained elsewhere.

    Raises:
        ZeroError: there are none.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    if getattr(features, "pooler_output", None) is not None:  # transformers 5
        # Features of inner layers go to the language model, too, where a tower gives them (Qwen3-VL).
        features = [features.pooler_output, getattr(features, "deepstack_features", None)]
    tensors = [leaf for leaf in tree_leaves(features) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ZeroError(
            "BALANCE_MODE=zero3: the model's tower returns no floating-point features, so ranks without pictures or "
            "sound cannot run it with the others; give every batch a picture (or sound)"
        )
    return tensors
