"""Compose the peak of a device from its blocks over time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .cost import BlockCost

NOTHING = BlockCost()


@dataclass(frozen=True)
class Schedule:
    """How a training step goes, as far as peaks depend on it.

    Attributes:
        accumulating: whether gradients of earlier micro-batches exist all the time.
        step_at_once: whether the optimizer takes all tensors of a device together, so that its temporaries add up, or
            one after the other.
        replicated: whether the model is one of several replicas: `DistributedDataParallel` keeps buckets in which
            gradients are added up, as large as all gradients together, from its first step on.
    """

    accumulating: bool = False
    step_at_once: bool = False
    replicated: bool = False

    def buckets(self, gradients: int) -> int:
        """Return the bytes of the buckets for `gradients` bytes."""
        return gradients if self.replicated else 0


PLAIN = Schedule()


class Composition:
    """The peak of a device whose blocks are added in the order of the forward pass, kept up to date at each one.

    Weights, optimizer state and the buckets of replicas are there throughout. Going forward, what blocks keep piles up.
    Going backward, gradients appear as activations go: while a block runs backward there is what the blocks before it
    keep, and the gradients of those behind it. With accumulation the gradients of earlier micro-batches exist all the
    time. In the end all gradients are there, with what the optimizer needs for its step. Between steps there may be an
    evaluation, a forward pass with nothing else in memory than weights and optimizer state. A block is one phase here;
    `in_order` divides blocks that have several.
    """

    __slots__ = (
        "_activations", "_backward", "_evaluation", "_evaluation_kept", "_evaluation_throughout", "_forward",
        "_gradients", "_held", "_inputs", "_optimizer", "_residue", "_schedule", "_step",
    )  # fmt: skip

    def __init__(self, schedule: Schedule = PLAIN) -> None:
        self._schedule = schedule
        self._held = self._optimizer = self._gradients = self._activations = self._step = 0
        self._residue = self._inputs = 0
        self._forward = self._backward = 0  # the most in each pass, without what is there throughout
        self._evaluation = self._evaluation_kept = self._evaluation_throughout = 0

    def add(self, cost: BlockCost) -> None:
        """Append a block."""
        self._forward, self._backward, self._step = self._moments_with(cost)
        self._held += cost.weights + cost.optimizer + cost.inputs + self._schedule.buckets(cost.gradients)
        self._inputs += cost.inputs
        self._optimizer += cost.optimizer
        self._gradients += cost.gradients
        self._residue += cost.residue
        self._activations += cost.activations
        self._evaluation = max(self._evaluation, self._evaluation_kept + cost.evaluation)
        self._evaluation_kept += cost.evaluation_kept
        self._evaluation_throughout += cost.evaluation_throughout

    def peak(self, last: BlockCost = NOTHING) -> int:
        """Return the peak in bytes, if `last` came behind the blocks so far."""
        forward, backward, step = self._moments_with(last)
        gradients = self._gradients + last.gradients
        throughout = gradients if self._schedule.accumulating else 0
        held = self._held + last.weights + last.optimizer + last.inputs + self._schedule.buckets(last.gradients)
        evaluation = max(self._evaluation, self._evaluation_kept + last.evaluation)
        evaluation += self._evaluation_throughout + last.evaluation_throughout
        return held + max(throughout + max(forward, backward), gradients + step, evaluation)

    def whole(self) -> BlockCost:
        """Return the blocks so far as one block."""
        return BlockCost(
            weights=self._held - self._optimizer - self._inputs - self._schedule.buckets(self._gradients),
            gradients=self._gradients,
            optimizer=self._optimizer,
            activations=self._activations,
            forward=self._forward,
            backward=self._backward,
            step=self._step,
            evaluation=self._evaluation,
            evaluation_kept=self._evaluation_kept,
            evaluation_throughout=self._evaluation_throughout,
            inputs=self._inputs,
            residue=self._residue,
        )

    def _moments_with(self, cost: BlockCost) -> tuple[int, int, int]:
        """Return the most in the forward pass, in the backward pass and in the step, with `cost` as the last block."""
        forward = max(self._forward, self._activations + cost.forward)
        # Backward comes to this block first, so every moment of the earlier ones has its gradients, too.
        arriving = cost.residue + (0 if self._schedule.accumulating else cost.gradients)
        backward = max(self._backward + arriving, self._activations + cost.backward)
        step = self._step + cost.step if self._schedule.step_at_once else max(self._step, cost.step)
        return forward, backward, step


def peak(costs: Iterable[BlockCost], schedule: Schedule = PLAIN) -> int:
    """Return the most bytes that a device holds at once in a training step with these blocks, in forward order.

    Where costs have ranks, these are the order.
    """
    return _composed(in_order(costs), schedule).peak()


def peak_terms(costs: Sequence[BlockCost], schedule: Schedule = PLAIN) -> dict[str, int]:
    """Return the terms of `peak(costs, schedule)`, in bytes, at the moment when it occurs."""
    costs = in_order(costs)
    gradients = sum(cost.gradients for cost in costs)
    left = sum(cost.residue for cost in costs)
    combine = sum if schedule.step_at_once else max
    # Each moment: gradients, activations, and the whole.
    step = combine([cost.step for cost in costs] or [0])
    moments = [(gradients, 0, gradients + step)]
    activations, behind = 0, gradients
    for cost in costs:
        activations_after = activations + cost.activations
        gradients_before = gradients if schedule.accumulating else 0
        moments.append((gradients_before, activations_after, gradients_before + activations + cost.forward))
        left -= cost.residue
        grown = gradients if schedule.accumulating else behind
        rest = left + (grown if schedule.accumulating else behind - cost.gradients)
        moments.append((grown, activations_after, rest + activations + cost.backward))
        activations = activations_after
        behind -= cost.gradients
    evaluated = sum(cost.evaluation_throughout for cost in costs)
    for cost in costs:
        activations_after = evaluated + cost.evaluation_kept
        moments.append((0, activations_after, evaluated + cost.evaluation))
        evaluated = activations_after
    gradients, activations, whole = max(moments, key=lambda moment: moment[2])
    # Not all of a block's activations and gradients need be there at the moment when most is.
    gradients = min(gradients, whole)
    activations = min(activations, whole - gradients)
    buckets = schedule.buckets(sum(cost.gradients for cost in costs))
    return {
        "weights": sum(cost.weights for cost in costs),
        "gradients": gradients + buckets,
        "optimizer": sum(cost.optimizer for cost in costs),
        "activations": activations + sum(cost.inputs for cost in costs),
        "temporary": whole - gradients - activations,
    }


class RunPeaks:
    """The peaks of a device with any run of a chain, worked out as far as somebody asks: the solver's `Loads`.

    `first` and `last` are costs that the device has with any run, ahead of it and behind it.
    """

    def __init__(
        self,
        costs: Sequence[BlockCost],
        schedule: Schedule = PLAIN,
        first: BlockCost = NOTHING,
        last: BlockCost = NOTHING,
    ):
        permanent = dict((*first.gives, *last.gives))
        if permanent:
            sizes = dict(copy for cost in costs for copy in cost.takes if not permanent.get(copy[0], True))
            first = first.with_more(kept=sum(sizes.values()), passing=sum(sizes.values()))  # of all copies one is left
            costs = [cost.sharing(permanent) for cost in costs]
        self._costs, self._schedule, self._first, self._last = costs, schedule, first, last
        self._rows: dict[int, tuple[list[float], Composition]] = {}

    def row(self, start: int, limit: float) -> Sequence[float]:
        """Return the peaks with 0, 1, 2, ... blocks from `start` on, in bytes, up to the first above `limit`."""
        if start not in self._rows:
            composition = Composition(self._schedule)
            composition.add(self._first)
            self._rows[start] = [composition.peak(self._last)], composition
        peaks, composition = self._rows[start]
        position = start + len(peaks) - 1
        while peaks[-1] <= limit and position < len(self._costs):
            composition.add(self._costs[position])
            peaks.append(composition.peak(self._last))
            position += 1
        return peaks


def in_order(costs: Iterable[BlockCost]) -> list[BlockCost]:
    """Return the costs of one device with a cost for each phase, by rank, without copies of tensors it already has."""
    phases = sorted((part for cost in costs for part in cost.in_phases()), key=lambda cost: cost.rank)
    permanent = dict(pair for cost in phases for pair in cost.gives)
    present = {tensor for tensor, is_kept in permanent.items() if is_kept}
    shared = []
    for cost in phases if permanent else ():
        shared.append(cost.sharing(present))
        present.update(tensor for tensor, _ in cost.takes if tensor in permanent)  # the first block has it all
    return shared or phases


def merged(costs: Iterable[BlockCost], schedule: Schedule = PLAIN) -> BlockCost:
    """Return the cost of blocks that follow each other on one device, as one."""
    costs = list(costs)
    phases = in_order(costs)
    return replace(
        _composed(phases, schedule).whole(),
        rank=min((cost.rank for cost in costs), default=0),
        takes=tuple(tensor for phase in phases for tensor in phase.takes),
        gives=tuple(tensor for phase in phases for tensor in phase.gives),
    )


def _composed(costs: Iterable[BlockCost], schedule: Schedule) -> Composition:
    composition = Composition(schedule)
    for cost in costs:
        composition.add(cost)
    return composition
