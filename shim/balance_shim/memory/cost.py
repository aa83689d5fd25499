"""The memory of one block in training, in bytes."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

TERMS = ("weights", "gradients", "optimizer", "activations", "temporary", "overhead")


# How the costs of a model were found.
LAST = 1 << 60  # the rank of phases that follow all blocks
TRACED = "traced"  # what plans note on costs of which all were traced; anything else tells what was not, and why
CostSource = Literal["trace", "blockwise trace", "formula", "formula after time-out"]


def is_estimate(source: CostSource) -> bool:
    """Whether no trace was had, so that figures may be far off."""
    return source.startswith("formula")


@dataclass(frozen=True)
class Phase:
    """One of several times at which a block, or the first device, computes in a pass, in bytes.

    Activations and residue are changes, which may be negative: a later phase frees what an earlier one made.

    Attributes:
        rank: its place in the forward pass; see `BlockCost.rank`.
        activations: the bytes that it adds to those kept until the backward pass.
        forward: the peak, beyond the bytes that earlier phases keep.
        backward: the peak in its backward pass, beyond the bytes that earlier phases keep and later ones left.
        residue: the bytes that its backward pass leaves for those of earlier phases, parameter gradients not counted.
    """

    rank: int = field(compare=False)
    activations: int = 0
    forward: int = 0
    backward: int = 0
    residue: int = 0

    def scaled(self, factor: float) -> "Phase":
        sizes = (self.activations, self.forward, self.backward, self.residue)
        return Phase(self.rank, *(int(size * factor) for size in sizes))


@dataclass(frozen=True)
class BlockCost:
    """The memory of one block, in bytes.

    Attributes:
        weights: parameters and buffers as they are loaded.
        gradients: one for each parameter that trains.
        optimizer: state that the optimizer keeps between steps.
        activations: kept from the block's forward pass to its backward pass.
        forward: the most that running forward adds to the bytes present before, including those it keeps.
        backward: the most that is there of this block while it runs backward: activations, temporaries, and the
            gradients as they appear. With accumulation the gradients are there anyway and do not count.
        step: the most that the optimizer's step adds.
        evaluation: the most that running forward adds in an evaluation, where gradients are not there.
        evaluation_kept: the part of that which stays until the batch has been evaluated.
        evaluation_throughout: bytes that an evaluation holds all the time, such as the outputs of earlier batches.
        inputs: batches that are there throughout a step.
        residue: bytes that its backward pass leaves behind, gradients not counted; see `Phase`.
        rank: its place in the forward pass as it was traced; blocks of the same rank keep the order of the chain.
        phases: where it computes at several times, with other blocks in between (an embedding whose output pictures are
            merged into after the tower has run): what it takes in each. `activations`, `forward` and `backward` are
            then those of all phases together.
        takes: (number of a tensor, bytes) of the inputs that the block keeps a copy of where the block that gives them
            is on another device.
        gives: (number of a tensor, whether it is kept in any case) of what other blocks take.
        first_backward: of blocks that were merged for micro-batches in flight: `backward` where gradients of the blocks
            appear; 0 where that is no other.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    forward: int = 0
    backward: int = 0
    step: int = 0
    evaluation: int = 0
    evaluation_kept: int = 0
    evaluation_throughout: int = 0
    inputs: int = 0
    residue: int = 0
    rank: int = field(default=0, compare=False)
    phases: tuple[Phase, ...] = ()
    takes: tuple[tuple[int, int], ...] = ()
    gives: tuple[tuple[int, bool], ...] = ()
    first_backward: int = 0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "BlockCost":
        """Return the cost that `dataclasses.asdict` has been called on."""
        takes, gives = (tuple(map(tuple, content[name])) for name in ("takes", "gives"))
        phases = tuple(Phase(**phase) for phase in content["phases"])
        return cls(**{**content, "phases": phases, "takes": takes, "gives": gives})

    def in_phases(self) -> "list[BlockCost]":
        """Return a cost for each phase; the first has the weights, gradients, optimizer state and evaluation."""
        if not self.phases:
            return [self]
        first, *later = (
            BlockCost(
                activations=phase.activations,
                forward=phase.forward,
                backward=phase.backward,
                residue=phase.residue,
                rank=phase.rank,
            )
            for phase in self.phases
        )
        of_first = {
            name: getattr(first, name) for name in ("activations", "forward", "backward", "residue", "rank", "phases")
        }
        # Which of the phases has the copies that it could spare is not known.
        return [replace(self, **of_first, takes=()), *later]

    def sharing(self, tensors: Container[int]) -> "BlockCost":
        """Return the cost where the block need not keep copies of `tensors`, numbers as in `takes`."""
        spared = sum(size for tensor, size in self.takes if tensor in tensors)
        if not spared:
            return self
        left = tuple((tensor, size) for tensor, size in self.takes if tensor not in tensors)
        return replace(self.with_more(kept=-spared, passing=-spared), takes=left)

    def with_more(self, kept: int = 0, passing: int = 0) -> "BlockCost":
        """Return the cost with `kept` more bytes of activations, and `passing` more in each pass."""
        phases = self.phases
        if phases:
            first = phases[0]
            more = replace(
                first,
                activations=first.activations + kept,
                forward=first.forward + passing,
                backward=first.backward + passing,
            )
            phases = (more, *phases[1:])
        return replace(
            self,
            activations=self.activations + kept,
            forward=self.forward + passing,
            backward=self.backward + passing,
            first_backward=self.first_backward and self.first_backward + passing,
            phases=phases,
        )

    def in_training(self) -> "BlockCost":
        """Return the cost without that of evaluations."""
        return replace(self, evaluation=0, evaluation_kept=0, evaluation_throughout=0)
