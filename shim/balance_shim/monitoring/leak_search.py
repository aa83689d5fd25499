"""Which tensors are kept alive on devices, and who keeps them: asked of the garbage collector, once, when memory grows.

That takes from a tenth of a second to seconds in a large process, so it is only done after an alarm.
"""

import gc
import os
import sys
import types
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

MANY = 3  # as many alike is what a program that forgets something has
LEVELS = 4  # containers in containers looked through
CONTAINERS = 4000  # more of them a level are not looked at
LIBRARIES = ("torch", "transformers", "accelerate", "trl", "peft", "balance_shim")


class Kept(NamedTuple):
    """Tensors that somebody keeps.

    Attributes:
        tensors: all of them.
        holder: who, in words: "list `losses` of module __main__"; "" where that was not found out.
        is_cache: whether what holds them calls itself a cache.
    """

    tensors: list[Any]
    holder: str
    is_cache: bool = False

    @property
    def shapes(self) -> str:
        """The shapes, the most frequent first: "12 x (2, 16, 64)"."""
        counted = Counter(tuple(tensor.shape) for tensor in self.tensors).most_common()
        shown = [f"{number} x {_shape(shape)}" for shape, number in counted[:3]]
        return ", ".join([*shown, *(["..."] if len(counted) > 3 else [])])

    @property
    def graphs(self) -> int:
        """How many of them hold a graph, and with it the activations of a step."""
        return sum(tensor.grad_fn is not None for tensor in self.tensors)

    def describe(self) -> str:
        """Return a description of the tensors in one phrase."""
        phrase = f"{len(self.tensors)} tensors are retained ({self.shapes})"
        if self.graphs:
            names = Counter(type(tensor.grad_fn).__name__ for tensor in self.tensors if tensor.grad_fn is not None)
            retaining = "each retains" if self.graphs == len(self.tensors) else f"{self.graphs} of them retain"
            phrase += (
                f"; {retaining} the graph that made it ({names.most_common(1)[0][0]}) and with it a step's activations"
            )
        if self.holder:
            phrase += f"; in the {self.holder}"
            phrase += ", a cache that is not cleared" if self.is_cache and not self.graphs else ""
        return phrase


def search(kind: str, model: "nn.Module", optimizer: Any, owner: Any = None) -> Kept | None:
    """Return the tensors on devices of type `kind` that are neither the model's nor the optimizer's but are kept.

    Those with a graph come first, because at the end of a step none should be left; then those that take most.

    Args:
        kind: "cuda", "npu", ...
        model: its parameters, gradients and buffers belong where they are; None for none.
        optimizer: the same for its state.
        owner: an object whose own attributes are left out.
    """
    excluded = _known(model, optimizer)
    candidates = [tensor for tensor in _tensors(kind) if id(tensor) not in excluded]
    graphs = [tensor for tensor in candidates if tensor.grad_fn is not None]
    groups = []
    for several in (graphs, candidates):
        if len(several) >= MANY:
            groups = _groups(several, owner, {id(graphs), id(candidates)})
            if groups:
                break
    if not groups:
        return Kept(graphs, "") if len(graphs) >= MANY else None
    container, tensors = max(groups, key=lambda group: sum(map(_bytes, group[1])))
    holder = _name_of(container)
    is_cache = "cache" in f"{type(container).__name__} {holder}".lower()
    return Kept(tensors, holder, is_cache)


def twins(kind: str, model: "nn.Module", optimizer: Any) -> list[Any]:
    """Return the tensors on the device of a matrix among the parameters of `model` that have its shape. See `search`.

    Whole numbers of the shape of a floating-point matrix are no copy of it: a batch may have the shape of a classifier.
    """
    excluded = _known(model, optimizer)
    spots = {_spot(parameter) for parameter in model.parameters() if parameter.dim() > 1}
    return [tensor for tensor in _tensors(kind) if id(tensor) not in excluded and _spot(tensor) in spots]


def _spot(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.device, tensor.is_floating_point()


def _tensors(kind: str) -> list[Any]:
    import torch

    # `type` and not `isinstance`: lazy objects import things when they are asked for their class.
    candidates = [candidate for candidate in gc.get_objects() if issubclass(type(candidate), torch.Tensor)]
    return [candidate for candidate in candidates if candidate.device.type == kind]


def _known(model: "nn.Module", optimizer: Any) -> set[int]:
    import torch

    excluded: set[int] = set()
    if model is not None:
        for parameter in model.parameters():
            excluded |= {id(parameter), id(parameter.grad)}
        excluded |= {id(buffer) for buffer in model.buffers()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in getattr(inner, "state", {}).values():
        if isinstance(state, dict):
            excluded |= {id(value) for value in state.values() if isinstance(value, torch.Tensor)}
    return excluded


def _groups(tensors: Sequence[Any], owner: Any, own: set[int]) -> list[tuple[Any, list[Any]]]:
    """Return (container, tensors in it, at whatever depth) for the innermost containers of at least `MANY`.

    `own` are the identities of lists of ours, which hold tensors, too.
    """
    below: dict[int, list[Any]] = {id(tensor): [tensor] for tensor in tensors}
    items: list[Any] = list(tensors)
    for _ in range(LEVELS):
        ignored = {*own, id(items), id(tensors), id(below), *map(id, below.values())}
        holders = [
            holder for holder in gc.get_referrers(*items) if id(holder) not in ignored and _may_hold(holder, owner)
        ]
        if not holders or len(holders) > CONTAINERS:
            return []
        inside: dict[int, list[Any]] = {}
        for holder in holders:
            held = {id(referent) for referent in gc.get_referents(holder) if id(referent) in below}
            inside[id(holder)] = [tensor for key in held for tensor in below[key]]
        many = [(holder, inside[id(holder)]) for holder in holders if len(inside[id(holder)]) >= MANY]
        # A tuple of one step's hidden states is several too, but one of many: what grows is what holds the tuples.
        if many and (len(many) < MANY or max(len(held) for _, held in many) >= len(tensors) / 2):
            return many
        below, items = inside, holders
    return []


def _may_hold(candidate: Any, owner: Any) -> bool:
    import torch

    if isinstance(candidate, (types.FrameType, types.ModuleType, type, types.FunctionType)) or candidate is owner:
        return False
    return not issubclass(type(candidate), (torch.Tensor, torch.nn.Module)) and candidate is not getattr(
        owner, "__dict__", None
    )


def _name_of(container: Any) -> str:
    """Return the name by which the program knows `container`, with its type; only the type where it has no name."""
    kind = type(container).__name__
    if isinstance(container, dict):
        owner = _owner_of(container)
        if owner:
            return f"attributes of {owner}"
    for frame in _users_frames():
        for name, value in frame.f_locals.items():
            if value is container and frame.f_locals is not frame.f_globals:
                return f"{kind} `{name}` in {frame.f_code.co_name}()"
    for referrer in gc.get_referrers(container):
        if isinstance(referrer, (types.FrameType, types.CellType)):
            continue
        attributes = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", None)
        if not isinstance(attributes, dict):
            continue
        for name, value in list(attributes.items()):
            if value is container and isinstance(name, str):
                owner = _owner_of(attributes) if referrer is attributes else _described(referrer)
                if owner:
                    return f"{kind} `{name}` of {owner}"
    return kind


def _owner_of(attributes: dict[Any, Any]) -> str:
    """Return whose attributes these are: a module, or an object."""
    if "__name__" in attributes and "__spec__" in attributes:
        return f"module {attributes['__name__']}"
    for referrer in gc.get_referrers(attributes):
        if getattr(referrer, "__dict__", None) is attributes:
            return _described(referrer)
    return ""


def _described(value: Any) -> str:
    kind = type(value)
    if kind.__module__ == "builtins":
        return ""
    return f"{kind.__qualname__} ({kind.__module__})"


def _users_frames() -> Iterable[types.FrameType]:
    """Yield the frames of this thread that are no library's. Theirs are left alone: to ask a frame for its variables
    keeps these alive until it ends."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if library not in LIBRARIES and f"{os.sep}site-packages{os.sep}" not in frame.f_code.co_filename:
            yield frame
        frame = frame.f_back


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
