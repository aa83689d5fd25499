"""Any model as an ordered chain of blocks, each of which stays whole on one device.

A block is the unit that a device map names: a module that must not be split, a leaf module, or a tensor that hangs
directly on a module whose children are placed apart. Every parameter and buffer belongs to exactly one block.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..upstream.model_ends import input_embedding, output_head

if TYPE_CHECKING:
    from torch import Tensor, nn


Role = Literal["embedding", "layer", "head", "tower", "other"]


@dataclass(frozen=True)
class Block:
    """One entry of a device map.

    Attributes:
        name: the module's (or the tensor's) full name, the key in the map; "" is the whole model.
        kind: the module's class name, or "tensor".
        role: "embedding", "layer", "head", "tower" (an encoder next to the language model) or "other".
        parameters: the full names of the parameters in it.
        buffers: the full names of the buffers in it, those that checkpoints leave out included.
    """

    name: str
    kind: str
    role: Role
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The full names of all that must have a device."""
        return self.parameters + self.buffers


def chain(model: "nn.Module", no_split: Collection[str] | None = None) -> tuple[Block, ...]:
    """Return the blocks of `model` in the order in which the forward pass meets them.

    Registration order is execution order in transformers' models, with one exception: small modules without
    parameters (`rotary_emb`) are registered last and run first. They follow their first neighbour.

    Args:
        model: may be on the meta device.
        no_split: class names of modules that must stay whole; by default those that the model itself declares, else the
            members of its module lists, and of sequences of like modules.
    """
    return split_at(model, layers_of(model, no_split))


def split_at(model: "nn.Module", layers: frozenset[str]) -> tuple[Block, ...]:
    """Return the blocks of `model`, in forward order, given the names of the modules that must stay whole."""
    role = _role_of(model, layers)
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return tuple(
        Block(
            name,
            kind,
            role(name),
            tuple(key for key in tensors if key in parameters),
            tuple(key for key in tensors if key not in parameters),
        )
        for name, kind, tensors in _split(model, "", layers)
        if tensors
    )


def layers_of(model: "nn.Module", no_split: Collection[str] | None = None) -> frozenset[str]:
    """Return the names of the modules that must stay whole; see `chain` for `no_split`."""
    from torch import nn
    from torch.nn.utils.parametrize import ParametrizationList

    classes = frozenset(no_split if no_split is not None else getattr(model, "_no_split_modules", None) or ())
    modules = list(model.named_modules(remove_duplicate=False))
    declared = frozenset(name for name, module in modules if type(module).__name__ in classes)
    # The list in which torch keeps the tensors of a weight (weight norm, LoRA as a parametrization) holds no layers.
    lists = [
        (name, module)
        for name, module in modules
        if isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
    ]
    listed = {f"{name}.{child}": member for name, module in lists for child, member in children_of(module)}
    # A list of embeddings or of linear maps holds parts of a layer, unless there is nothing larger to split.
    members = frozenset(name for name, member in listed.items() if list(member.children())) or frozenset(listed)
    if not declared:
        stacked = _stacked(modules)
        inner = {
            name for name in stacked if any(within(name, member) and name != member for member in members | stacked)
        }
        outer = {name for name in stacked if any(within(member, name) for member in members)}
        members |= stacked - inner - outer
    # Idefics3 and others declare the attention of their towers: what a layer adds to its own input stays with it.
    return frozenset(holder_of(name, members) or name for name in declared) or members


def _stacked(modules: "Iterable[tuple[str, nn.Module]]") -> frozenset[str]:
    """Return the names of the members of `nn.Sequential`s of like modules, at least two that have modules in them."""
    from torch import nn

    stacked: set[str] = set()
    for name, module in modules:
        members = list(children_of(module)) if isinstance(module, nn.Sequential) else []
        kinds = {type(member) for _, member in members}
        if len(members) > 1 and len(kinds) == 1 and all(list(member.children()) for _, member in members):
            stacked.update(f"{name}.{child}" if name else child for child, _ in members)
    return frozenset(stacked)


def children_of(module: "nn.Module") -> "Iterator[tuple[str, nn.Module]]":
    """Yield the children of `module` under every name that they have in it.

    A layer that a model lists several times, to run several times, needs a device under each of its names.
    """
    yield from ((name, child) for name, child in module._modules.items() if child is not None)


def names_of_shared_modules(model: "nn.Module") -> frozenset[str]:
    """Return all names of the modules that have more than one."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return frozenset(name for same in names.values() if len(same) > 1 for name in same)


def _split(module: "nn.Module", name: str, layers: frozenset[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (name, class name, tensors) for each block at and below `module`."""
    inside = f"{name}." if name else ""
    holds_layers = any(layer.startswith(inside) and layer != name for layer in layers)
    children = list(children_of(module))
    # A module that holds no layers gains nothing from being split, and may use its direct tensors anywhere.
    if name in layers or not children or (name and not holds_layers):
        yield name, type(module).__name__, tuple(f"{inside}{key}" for key in _tensor_names(module))
        return
    for key, _ in _direct_tensors(module):
        yield f"{inside}{key}", "tensor", (f"{inside}{key}",)
    for child_name, child in children:
        yield from _split(child, f"{inside}{child_name}", layers)


def _tensor_names(module: "nn.Module") -> Iterator[str]:
    for prefix, child in module.named_modules(remove_duplicate=False):
        for key, _ in _direct_tensors(child):
            yield f"{prefix}.{key}" if prefix else key


def _direct_tensors(module: "nn.Module") -> Iterator[tuple[str, "Tensor"]]:
    """Yield a module's own parameters and buffers, non-persistent ones too: a device map must cover those as well."""
    own: Iterable[tuple[str, Any]] = [*module._parameters.items(), *module._buffers.items()]
    yield from ((key, tensor) for key, tensor in own if tensor is not None)


def _role_of(model: "nn.Module", layers: frozenset[str]) -> Callable[[str], Role]:
    """Return a function from a block's name to its role."""
    embedding = _name_of(input_embedding(model), model)
    head = _name_of(output_head(model), model)
    # The language model is what holds the input embedding. Layers outside of it belong to a tower, whose root is
    # where their path leaves the language model's.
    text = embedding.rpartition(".")[0]
    outside = [layer for layer in layers if not within(embedding, layer)]
    while text and not any(within(layer, text) for layer in outside):  # BERT keeps its embeddings in a module of theirs
        text = text.rpartition(".")[0]
    towers = {_fork(layer, text) for layer in outside if not within(layer, text)}

    def role(name: str) -> Role:
        # A block may be the embedding, or a module around it.
        if embedding and (within(name, embedding) or within(embedding, name)):
            return "embedding"
        if head and (within(name, head) or within(head, name)):
            return "head"
        if any(within(name, tower) for tower in towers):
            return "tower"
        return "layer" if name in layers else "other"

    return role


def within(name: str, outer: str) -> bool:
    """Whether `name` is `outer` or below it; everything is within "", the whole model."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def holder_of(name: str, names: Container[str]) -> str | None:
    """Return which of `names` is the innermost at or above `name`; None if none is."""
    while name not in names:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def anchors(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Return for each block the position of the block that it goes with: its own for most.

    Blocks without parameters (rotary embeddings) and single tensors go with the first other block of their parent
    module. They cost next to nothing, and away from their users each step would copy what they give.
    """
    followers = [block.kind == "tensor" or not block.parameters for block in blocks]
    if all(followers):
        return tuple(range(len(blocks)))
    positions = []
    for position, block in enumerate(blocks):
        parent = block.name.rpartition(".")[0]
        leaders = [leader for leader, follows in enumerate(followers) if not follows]
        family = [leader for leader in leaders if blocks[leader].name.startswith(f"{parent}.")]
        positions.append((family or leaders)[0] if followers[position] else position)
    return tuple(positions)


def _fork(name: str, other: str) -> str:
    """Return the part of `name` up to and including the first component in which it differs from `other`."""
    path, other_path = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(path), len(other_path)) and path[shared] == other_path[shared]:
        shared += 1
    return ".".join(path[: shared + 1])


def _name_of(end: "nn.Module | None", model: "nn.Module") -> str:
    """Return the name of the module `end` in `model`; "" for None."""
    return next((name for name, module in model.named_modules() if module is end), "")
