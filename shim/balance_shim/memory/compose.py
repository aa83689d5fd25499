"""From blocks to a device: the peak as it happens in time, not as a sum."""

from collections.abc import Iterable, Sequence

from .estimate import BlockCost

NOTHING = BlockCost()


class Composition:
    """The peak of a device whose blocks are added in the order of the forward pass, kept up to date at each one.

    Weights and optimizer state are there throughout. Going backward, gradients appear as activations go: while a
    block runs backward, its own activations and those of the blocks before it exist, and the gradients of itself and
    of the blocks after it. With accumulation the gradients of earlier micro-batches exist all the time.
    """

    __slots__ = ("_accumulating", "_activations", "_gradients", "_held", "_worst")

    def __init__(self, accumulation: int = 1) -> None:
        self._accumulating = accumulation > 1
        self._held = self._gradients = self._activations = self._worst = 0

    def add(self, cost: BlockCost) -> None:
        """Add a block behind the others."""
        self._held += cost.weights + cost.optimizer
        self._gradients += cost.gradients
        self._worst = self._worst_with(cost)
        self._activations += cost.activations

    def peak(self, last: BlockCost = NOTHING) -> int:
        """Return the peak in bytes, if `last` came behind the blocks so far."""
        gradients = self._gradients + last.gradients if self._accumulating else 0
        return self._held + last.weights + last.optimizer + gradients + self._worst_with(last)

    def _worst_with(self, cost: BlockCost) -> int:
        # Backward comes to this block first, so every moment of the earlier ones has its gradient, too.
        arriving = 0 if self._accumulating else cost.gradients
        return arriving + max(self._worst, self._activations + cost.activations + cost.temporary)


def peak(costs: Iterable[BlockCost], accumulation: int = 1) -> int:
    """Return the most bytes that a device holds at once in a training step with these blocks, in forward order."""
    composition = Composition(accumulation)
    for cost in costs:
        composition.add(cost)
    return composition.peak()


def peak_terms(costs: Sequence[BlockCost], accumulation: int = 1) -> dict[str, int]:
    """Return what `peak(costs, accumulation)` is made of, in bytes by term, at the moment when it occurs."""
    moments = [(0, sum(cost.gradients for cost in costs), 0)]
    activations, behind = 0, sum(cost.gradients for cost in costs)
    for cost in costs:
        activations += cost.activations
        moments.append((activations, moments[0][1] if accumulation > 1 else behind, cost.temporary))
        behind -= cost.gradients
    activations, gradients, temporary = max(moments, key=sum)
    return {
        "weights": sum(cost.weights for cost in costs),
        "gradients": gradients,
        "optimizer": sum(cost.optimizer for cost in costs),
        "activations": activations,
        "temporary": temporary,
    }


def segment_peaks(
    costs: Sequence[BlockCost], accumulation: int = 1, first: BlockCost = NOTHING, last: BlockCost = NOTHING
) -> list[list[int]]:
    """Return rows so that `rows[i][j - i]` is the peak, in bytes, of a device with `first`, blocks i to j-1 and `last`.

    `first` and `last` are what sits on that device whichever run of the chain it gets, ahead of it and behind it.
    """
    rows = []
    for start in range(len(costs) + 1):
        composition = Composition(accumulation)
        composition.add(first)
        row = [composition.peak(last)]
        for cost in costs[start:]:
            composition.add(cost)
            row.append(composition.peak(last))
        rows.append(row)
    return rows
