"""Operations on deferred logits that need no full logits: row by row, on the rows, and sums over the vocabulary.

Each handler returns NotImplemented for arguments that it does not know, and the operation then gets the logits in full.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ..map_file import ACCELERATOR_TYPES
from .deferred import DeferredLogits, defer
from .recipe import Recipe

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Tensor = torch.Tensor


def _step(func: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    """Something done to each value: a conversion, scaling, soft-capping."""
    if not all(_is_scalar(argument) for argument in (*args, *kwargs.values())):
        return NotImplemented
    return defer(recipe.then(lambda values: func(values, *args, **kwargs)))


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, DeferredLogits) and value.dim() == 0 and not value.requires_grad
    return value is None or isinstance(value, (int, float, str, torch.dtype, torch.device, torch.memory_format))


def _softmax(func: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    """Something done to each row over the vocabulary that keeps its shape."""
    along_last = _last_dimension(recipe, args, kwargs)
    if along_last is None:
        return NotImplemented
    args, kwargs = along_last
    return _step(func, recipe, args, kwargs)


def _last_dimension(recipe: Recipe, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Return the arguments with the vocabulary's dimension as -1; None if they mean another one, or all."""
    dimension = args[0] if args else kwargs.get("dim")
    if isinstance(dimension, (tuple, list)) and len(dimension) == 1:
        dimension = dimension[0]
    if isinstance(dimension, bool) or not isinstance(dimension, int):
        return None
    if dimension not in (-1, len(recipe.shape) - 1):
        return None
    return ((-1, *args[1:]), kwargs) if args else ((), {**kwargs, "dim": -1})


def _over_vocabulary(func: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    """A sum, an extreme or its place over the vocabulary: [..., V] -> [...] or [..., 1]."""
    along_last = _last_dimension(recipe, args, kwargs)
    if along_last is None or "out" in kwargs:
        return NotImplemented
    args, kwargs = along_last
    parts = recipe.by_chunks(lambda values: func(values, *args, **kwargs))
    lead = recipe.shape[:-1]
    if isinstance(parts[0], tuple):  # values and places
        return type(parts[0])([_joined(chunks, lead) for chunks in zip(*parts, strict=True)])
    return _joined(parts, lead)


def _joined(parts: Sequence[Tensor], lead: torch.Size) -> Tensor:
    joined = torch.cat(list(parts))
    return joined.reshape(*lead, *joined.shape[1:])


def _gather(func: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    named = dict(zip(("dim", "index"), args, strict=False)) | kwargs
    index, lead = named.get("index"), recipe.shape[:-1]
    if set(named) != {"dim", "index"} or _last_dimension(recipe, (named["dim"],), {}) is None:
        return NotImplemented
    if not isinstance(index, Tensor) or index.shape[:-1] != lead:
        return NotImplemented
    flat = index.reshape(-1, index.shape[-1])
    return _joined(recipe.by_chunks(lambda values, places: func(values, -1, places), flat), lead)


def _cross_entropy(func: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    named = dict(zip(("target", "weight", "size_average", "ignore_index", "reduce", "reduction"), args, strict=False))
    named |= kwargs
    target, ignored = named.get("target"), named.get("ignore_index", -100)
    reduction, smoothing = named.get("reduction", "mean"), named.get("label_smoothing", 0.0)
    if any(named.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return NotImplemented
    if len(recipe.shape) != 2 or not isinstance(target, Tensor) or target.shape != recipe.shape[:1]:
        return NotImplemented
    if target.is_floating_point() or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    chunk_reduction = "none" if reduction == "none" else "sum"

    def loss(values: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            values, labels, ignore_index=ignored, reduction=chunk_reduction, label_smoothing=smoothing
        )

    parts = recipe.by_chunks(loss, target)
    if reduction == "none":
        return torch.cat(parts)
    total = torch.stack(parts).float().sum()
    if reduction == "mean":
        total = total / (target != ignored).sum()
    return total.to(parts[0].dtype)


def _index(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    (key,) = args
    keys = list(key) if isinstance(key, tuple) else [key]
    dimensions = len(recipe.shape)
    indexed = 0
    for index in keys:
        if index is Ellipsis:
            continue
        if isinstance(index, Tensor):
            if index.dtype != torch.bool and index.dim() != 1:
                return NotImplemented
            indexed += index.dim() if index.dtype == torch.bool else 1
        elif isinstance(index, slice) or (isinstance(index, int) and not isinstance(index, bool)):
            indexed += 1
        else:
            return NotImplemented
    if indexed > dimensions or sum(index is Ellipsis for index in keys) > 1:
        return NotImplemented
    # The vocabulary has to stay whole: reached by none of the keys, or by the one that takes all.
    reaches_last = indexed == dimensions or (any(index is Ellipsis for index in keys) and keys[-1] is not Ellipsis)
    if reaches_last and not (isinstance(keys[-1], slice) and keys[-1] == slice(None)):
        return NotImplemented
    device = recipe.rows.device
    moved = tuple(index.to(device) if isinstance(index, Tensor) else index for index in keys)
    copies = any(isinstance(index, Tensor) for index in keys)
    return defer(recipe.of_rows(operator.itemgetter(moved), None if copies else operator.itemgetter(moved)))


def _reshape(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if kwargs or not shape or not all(isinstance(length, int) for length in shape) or shape[-1] != recipe.shape[-1]:
        return NotImplemented
    return defer(_viewed(recipe, lambda rows: rows.reshape(*shape[:-1], rows.shape[-1])))


def _flatten(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    named = dict(zip(("start_dim", "end_dim"), args, strict=False)) | kwargs
    start, end, dimensions = named.get("start_dim", 0), named.get("end_dim", -1), len(recipe.shape)
    if end % dimensions == dimensions - 1:
        return NotImplemented
    return defer(_viewed(recipe, lambda rows: rows.flatten(start, end)))


def _same(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    return defer(recipe.of_rows(lambda rows: rows, torch.Tensor.contiguous))


def _detach(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    return defer(recipe.detached())


def _rows_apart(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    dimension = args[0] if args else kwargs.get("dim", 0)
    if dimension != 0 or len(recipe.shape) < 2:
        return NotImplemented
    return tuple(defer(_viewed(recipe, operator.itemgetter(row))) for row in range(recipe.shape[0]))


def _split(_: Callable[..., Any], recipe: Recipe, args: Args, kwargs: Kwargs) -> Any:
    named = dict(zip(("split_size", "dim"), args, strict=False)) | kwargs
    sizes = named.get("split_size", named.get("split_size_or_sections"))
    dimension = named.get("dim", 0)
    if not isinstance(sizes, int) or not 0 <= dimension < len(recipe.shape) - 1:
        return NotImplemented
    starts = range(0, recipe.shape[dimension], sizes)
    lengths = [min(sizes, recipe.shape[dimension] - start) for start in starts]
    cuts = [partial(torch.narrow, dim=dimension, start=a, length=b) for a, b in zip(starts, lengths, strict=True)]
    return tuple(defer(_viewed(recipe, cut)) for cut in cuts)


def _viewed(recipe: Recipe, select: Callable[[Tensor], Tensor]) -> Recipe:
    """Return the recipe of the logits after `select`, which is applied to the rows instead."""
    return recipe.of_rows(select, select)


def register() -> None:
    """Tell `DeferredLogits` which operations it can do in chunks."""
    handlers = DeferredLogits.handlers
    for handler, names in (
        (_step, "float half bfloat16 double to cpu mul multiply div divide true_divide tanh neg negative "
                "__mul__ __rmul__ __truediv__ __neg__ " + " ".join(ACCELERATOR_TYPES)),
        (_softmax, "log_softmax softmax"),
        (_over_vocabulary, "argmax argmin sum mean logsumexp amax amin max min"),
        (_gather, "gather"),
        (_index, "__getitem__"),
        (_reshape, "view reshape"),
        (_flatten, "flatten"),
        (_same, "contiguous"),
        (_detach, "detach"),
        (_rows_apart, "unbind __iter__"),
        (_split, "split"),
    ):  # fmt: skip
        for name in names.split():
            for owner in (torch.Tensor, torch):
                if callable(getattr(owner, name, None)):
                    handlers[getattr(owner, name)] = handler
    handlers[functional.cross_entropy] = _cross_entropy
    handlers[functional.log_softmax] = handlers[functional.softmax] = _softmax
    handlers[functional.tanh] = _step
