"""From blocks to a device: the peak as it happens in time, not as a sum."""

from collections.abc import Iterable, Sequence

from .estimate import BlockCost


class Composition:
    """The peak of a device whose blocks are added in the order of the forward pass, kept up to date at each one.

    Weights and optimizer state are there throughout. Going backward, gradients appear as activations go: while a
    block runs backward, its own activations and those of the blocks before it exist, and the gradients of itself and
    of the blocks after it. With accumulation the gradients of earlier micro-batches exist all the time.
    """

    __slots__ = ("_accumulating", "_activations", "_gradients", "_held", "_worst")

    def __init__(self, accumulation: int = 1, base: BlockCost | None = None) -> None:
        """Start a device that holds `base` (bytes), if given, before any block of the chain."""
        self._accumulating = accumulation > 1
        self._held = self._gradients = self._activations = self._worst = 0
        if base is not None:
            self.add(base)

    def add(self, cost: BlockCost) -> int:
        """Add a block behind the others and return the new peak in bytes."""
        self._held += cost.weights + cost.optimizer
        self._activations += cost.activations
        self._gradients += cost.gradients
        if self._accumulating:
            self._worst = max(self._worst, self._activations + cost.temporary)
            return self._held + self._gradients + self._worst
        # Every earlier moment of the backward pass now has this block's gradient too, as backward comes here first.
        self._worst = cost.gradients + max(self._worst, self._activations + cost.temporary)
        return self._held + self._worst


def peak(costs: Iterable[BlockCost], accumulation: int = 1, base: BlockCost | None = None) -> int:
    """Return the most bytes that a device holds at once in a training step with these blocks, in forward order."""
    composition = Composition(accumulation, base)
    last = composition.add(BlockCost())
    for cost in costs:
        last = composition.add(cost)
    return last


def segment_peaks(
    costs: Sequence[BlockCost], accumulation: int = 1, base: BlockCost | None = None
) -> list[list[int]]:
    """Return rows so that `rows[i][j - i]` is the peak of a device with blocks i to j-1; j - i = 0 is `base` alone."""
    rows = []
    for start in range(len(costs) + 1):
        composition = Composition(accumulation, base)
        rows.append([composition.add(BlockCost()), *(composition.add(cost) for cost in costs[start:])])
    return rows
