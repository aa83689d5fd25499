"""Records shared between seams: the last TrainingArguments, and the plan of each placed model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

if TYPE_CHECKING:
    from torch import nn

    from .plan import Plan

# Both weakly: the shim must not keep a model, or arguments that hold a process group, alive.
_arguments: "ref[Any] | None" = None
_leaving: "list[tuple[Mapping[int, int], nn.Module | None]]" = []
_placed: "WeakKeyDictionary[nn.Module, Placed]" = WeakKeyDictionary()
_had_no_map: "WeakSet[nn.Module]" = WeakSet()
_had_map: "WeakSet[nn.Module]" = WeakSet()


class Placed(NamedTuple):
    """A model that a plan has placed.

    `files` is the number of the plan's files in the report folder, if any; `max_memory` is what the script passed to
    `from_pretrained`; `number` counts the models that were in use when it was placed, from 1.
    """

    plan: "Plan"
    files: int | None = None
    max_memory: Any = None
    number: int = 1


def remember_arguments(arguments: Any) -> None:
    """Keep the `TrainingArguments` that were made last: they are most likely those of the model to come."""
    global _arguments
    _arguments = ref(arguments)


def arguments() -> Any | None:
    """Return the `TrainingArguments` made last, if they are still in use."""
    return None if _arguments is None else _arguments()


def remember_placed(model: "nn.Module", placed: Placed) -> None:
    _placed[model] = placed


def remember_no_map(model: "nn.Module") -> None:
    """Note that the script has loaded `model`, which was placed, without a device map."""
    _had_no_map.add(model)


def had_no_map(model: "nn.Module") -> bool:
    """Whether the script has loaded `model` without a device map."""
    return model in _had_no_map


def remember_map(model: "nn.Module") -> None:
    """Note that `model` was loaded with a device map: a string, a device, or a dict of the script's own."""
    _had_map.add(model)


def has_map(model: "nn.Module") -> bool:
    """Whether a device map was given for `model`, or for one inside of it.

    Not every version notes a map of one device as `hf_device_map`: transformers 5 does not.
    """
    return any(module in _had_map or "hf_device_map" in vars(module) for module in model.modules())


def first_device_of(model: "nn.Module") -> int | None:
    """Return the index of the device where the inputs of `model` arrive; None if no map of ours has placed it."""
    placed = _placed.get(model)
    return placed.plan.devices[0].device.index if placed is not None and placed.plan.is_ours else None


def placed_models() -> "list[nn.Module]":
    """Return the models that are still in use of those that plans have placed."""
    return list(_placed)


def compared_models() -> "list[nn.Module]":
    """Return the models in use that others may be compared with: placed ones, then those with a map of another kind.

    A model that the one that loads now replaces is not among them.
    """
    going = _ids_leaving()
    models = [*_placed, *(model for model in _had_map if model not in _placed)]
    return [model for model in models if id(model) not in going]


def next_number() -> int:
    """Return the number of the model that loads now among those in use that plans have placed, from 1."""
    going = _ids_leaving()
    return 1 + max((entry.number for model, entry in _placed.items() if id(model) not in going), default=0)


def _ids_leaving() -> set[int]:
    return {id(module) for _, model in _leaving if model is not None for module in model.modules()}


@contextmanager
def leaving(held: Mapping[int, int], model: "nn.Module | None" = None) -> Iterator[None]:
    """Have the models that load in this context planned for without the memory of another one, which they replace.

    Args:
        held: device index -> bytes.
        model: the one that they replace; None for none.
    """
    _leaving.append((held, model))
    try:
        yield
    finally:
        _leaving.pop()


def bytes_leaving() -> Mapping[int, int]:
    """Return device index -> bytes that will be free when the model that loads now is in use."""
    return _leaving[-1][0] if _leaving else {}


def placed(model: "nn.Module") -> "tuple[nn.Module, Placed] | None":
    """Return the model that was placed by a plan, and how: `model` itself or one inside of it (PEFT wraps)."""
    for module in model.modules():
        if module in _placed:
            return module, _placed[module]
    return None
