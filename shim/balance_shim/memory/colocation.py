"""Blocks that have to share a device, because the model uses tensors of both in one operation outside of any module.

Inputs of modules are brought to where the module is. What a model adds, gathers or multiplies between its modules is
not, so that it fails when the two come from different devices.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import Block
from .structure import ModelStructure


@dataclass(frozen=True)
class Constraints:
    """Blocks that have to share a device, as dry runs and training steps have shown.

    Attributes:
        groups: the names of blocks that must share a device, whichever that is.
        on_first: the names of blocks that must be on the first device, where the inputs are.
    """

    groups: tuple[frozenset[str], ...] = ()
    on_first: frozenset[str] = frozenset()

    def with_met(self, met: frozenset[str | None]) -> "Constraints":
        """Return the constraints with one more, between the blocks that `met`; None stands for the inputs."""
        names = frozenset(name for name in met if name is not None)
        touched = [group for group in self.groups if group & names]
        connected = names.union(*touched)
        if None in met or connected & self.on_first:
            return Constraints(tuple(group for group in self.groups if group not in touched), self.on_first | connected)
        if len(connected) < 2:
            return self
        return Constraints((*(group for group in self.groups if group not in touched), connected), self.on_first)

    def with_all(self, met: Iterable[frozenset[str | None]]) -> "Constraints":
        """Return the constraints with one for each of `met`."""
        constraints = self
        for group in met:
            constraints = constraints.with_met(group)
        return constraints

    def renamed(self, new_name: Callable[[str], str]) -> "Constraints":
        return Constraints(
            tuple(frozenset(map(new_name, group)) for group in self.groups), frozenset(map(new_name, self.on_first))
        )

    def and_those(self, other: "Constraints") -> "Constraints":
        constraints = self.with_all(other.groups)
        return constraints.with_met(other.on_first | {None}) if other.on_first else constraints

    def to_json(self) -> dict[str, Any]:
        return {"groups": [sorted(group) for group in self.groups], "on_first": sorted(self.on_first)}

    @classmethod
    def from_json(cls, content: Mapping[str, Sequence[Any]]) -> "Constraints":
        """Return the constraints that `to_json` has been called on."""
        return cls(tuple(map(frozenset, content["groups"])), frozenset(content["on_first"]))


NO_CONSTRAINTS = Constraints()


def of_the_loss(structure: ModelStructure) -> Constraints:
    """Return the constraints of a model whose loss is computed on the first device: all behind the layers is there."""
    return Constraints(on_first=frozenset(block.name for block in structure.end))


def of_unreached(structure: ModelStructure, unreached: frozenset[str]) -> tuple[Constraints, ...]:
    """Return constraints for blocks that no dry run has reached, the most careful first.

    It is unknown which blocks these share operations with. Together on the first device they run as on one. Where
    that has no room, a tower may go to another device as one, then its layers to several.

    Args:
        unreached: the names of the blocks that took no part in any dry run.
    """
    if not unreached:
        return (NO_CONSTRAINTS,)
    alone = unreached - structure.named("layer")
    towers = [tower for tower in structure.towers if unreached.issuperset(tower)]
    in_towers = frozenset().union(*towers)
    on_first = alone - in_towers
    if towers or structure.named("layer") <= unreached:
        # The output of a tower is inserted into that of the embedding.
        on_first |= structure.named("embedding")
    outside_layers = [frozenset(name for name in tower if not _is_numbered(name)) for tower in towers]
    levels = (
        Constraints(on_first=on_first | in_towers),
        Constraints(tuple(tower for tower in towers if len(tower) > 1), on_first),
        Constraints(tuple(group for group in outside_layers if len(group) > 1), on_first),
        NO_CONSTRAINTS,
    )
    return tuple(level for number, level in enumerate(levels) if level not in levels[:number])


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def of_all_but_layers(blocks: Sequence[Block]) -> Constraints:
    """Return the most careful constraints: everything but the layers on the first device."""
    return Constraints(on_first=frozenset(block.name for block in blocks if block.role != "layer"))
