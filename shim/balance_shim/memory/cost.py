"""The memory of one block in training, in bytes."""

from dataclasses import dataclass, replace
from typing import Literal

TERMS = ("weights", "gradients", "optimizer", "activations", "temporary", "overhead")


# How the costs of a model were found.
TRACED = "traced"  # what plans note on costs of which all were traced; anything else tells what was not, and why
CostSource = Literal["trace", "blockwise trace", "formula", "formula after time-out"]


def is_estimate(source: CostSource) -> bool:
    """Whether no trace was had, so that figures may be far off."""
    return source.startswith("formula")


@dataclass(frozen=True)
class BlockCost:
    """What one block takes, in bytes.

    Attributes:
        weights: parameters and buffers as they are loaded.
        gradients: one for each parameter that trains.
        optimizer: state that the optimizer keeps between steps.
        activations: kept from the block's forward pass to its backward pass.
        forward: the most that running forward adds to what was there before, what it keeps included.
        backward: the most that is there of this block while it runs backward: activations, temporaries, and the
            gradients as they appear. With accumulation the gradients are there anyway and do not count.
        step: the most that the optimizer's step adds.
        evaluation: the most that running forward adds in an evaluation, where gradients are not there.
        evaluation_kept: what of that is there until the batch has been evaluated.
        evaluation_throughout: what an evaluation holds all the time, such as the outputs of batches before.
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

    def in_training(self) -> "BlockCost":
        """Return the cost without that of evaluations."""
        return replace(self, evaluation=0, evaluation_kept=0, evaluation_throughout=0)
