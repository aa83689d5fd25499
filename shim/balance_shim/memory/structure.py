"""The structure of a model: facts about its modules that planning, tracing and checking share, computed once."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .blocks import Block, Role, layers_of, names_of_shared_modules, split_at, within
from .ties import parameter_count, tied_groups

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelStructure:
    """A model's modules as a device map sees them. Holds names and numbers only, no module and no tensor.

    Attributes:
        model_class: class name of the model.
        blocks: in forward order.
        layers: the names of the modules that must stay whole.
        ties: the groups of parameter names that share, or will share, one tensor.
        parameters: number of parameters, tied ones once.
        shared_modules: all names of the modules that have more than one.
    """

    model_class: str
    blocks: tuple[Block, ...]
    layers: frozenset[str] = frozenset()
    ties: tuple[frozenset[str], ...] = ()
    parameters: int = 0
    shared_modules: frozenset[str] = frozenset()

    def named(self, *roles: Role) -> frozenset[str]:
        """Return the names of the blocks that have one of `roles`."""
        return frozenset(block.name for block in self.blocks if block.role in roles)

    @property
    def entry(self) -> frozenset[str]:
        """The names of the blocks that take the inputs: the embedding; without one, the first with parameters."""
        first = next((block.name for block in self.blocks if block.parameters), None)
        return self.named("embedding") or frozenset(() if first is None else (first,))

    @property
    def end(self) -> tuple[Block, ...]:
        """The blocks behind the last layer, such as norm and head; none in a model without layers."""
        layers = [position for position, block in enumerate(self.blocks) if block.role == "layer"]
        return self.blocks[layers[-1] + 1 :] if layers else ()

    @property
    def sharing_layers(self) -> frozenset[str]:
        """The names of layers that are one module under several names, or share weights with other layers."""
        layers = [block for block in self.blocks if block.role in ("layer", "tower")]
        sharing = {block.name for block in layers} & self.shared_modules
        for group in self.ties:
            holders = [block.name for block in layers if not group.isdisjoint(block.parameters)]
            sharing.update(holders if len(holders) > 1 else ())
        return frozenset(sharing)

    @property
    def towers(self) -> tuple[frozenset[str], ...]:
        """The names of the blocks of each tower: all below the outermost module that holds none of the text model."""
        text = self.named("embedding", "layer", "head")
        towers: dict[str, set[str]] = {}
        for name in (block.name for block in self.blocks if block.role == "tower"):
            path = name.split(".")
            roots = (".".join(path[:depth]) for depth in range(1, len(path) + 1))
            root = next((root for root in roots if not any(within(block, root) for block in text)), name)
            towers.setdefault(root, set()).add(name)
        return tuple(map(frozenset, towers.values()))

    def part(self, name: str, module: "nn.Module") -> "ModelStructure":
        """Return the structure of `module`, which has `name` in this model, with names as it has them itself."""
        strip = len(name) + 1

        def inner(names: Collection[str]) -> tuple[str, ...]:
            return tuple(inside[strip:] for inside in names if within(inside, name))

        blocks = tuple(
            replace(block, name=block.name[strip:], parameters=inner(block.parameters), buffers=inner(block.buffers))
            for block in self.blocks
            if within(block.name, name)
        )
        ties = tuple(frozenset(inner(group)) for group in self.ties)
        return ModelStructure(
            type(module).__name__,
            blocks,
            frozenset(inner(self.layers)),
            tuple(group for group in ties if len(group) > 1),
            parameter_count(module, ties),
            frozenset(inner(self.shared_modules)),
        )


def structure_of(model: "nn.Module", no_split: Collection[str] | None = None) -> ModelStructure:
    """Return the structure of `model`, which may be on the meta device.

    Args:
        no_split: class names of modules that must stay whole; see `blocks.chain` for the default.
    """
    layers, ties = layers_of(model, no_split), tied_groups(model)
    return ModelStructure(
        model_class=type(model).__name__,
        blocks=split_at(model, layers),
        layers=layers,
        ties=ties,
        parameters=parameter_count(model, ties),
        shared_modules=names_of_shared_modules(model),
    )
