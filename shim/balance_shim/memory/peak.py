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
        in_flight: how many micro-batches go forward before the first of them goes backward.
        in_chunks: whether a step has more micro-batches than are in flight.
        shares_inputs: whether blocks on a device share one copy of an input that comes from another.
    """

    accumulating: bool = False
    step_at_once: bool = False
    replicated: bool = False
    in_flight: int = 1
    in_chunks: bool = False
    shares_inputs: bool = False

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of earlier micro-batches are there in a forward pass."""
        return self.accumulating and (self.in_flight == 1 or self.in_chunks)

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

    With several micro-batches in flight the activations of the others are there in each forward pass and in the first
    backward pass, in which gradients appear; in the second one there are all gradients, and one micro-batch is gone.
    """

    __slots__ = (
        "_activations", "_backward", "_evaluation", "_evaluation_kept", "_evaluation_throughout", "_first",
        "_forward", "_gradients", "_held", "_inputs", "_optimizer", "_residue", "_schedule", "_step",
    )  # fmt: skip

    def __init__(self, schedule: Schedule = PLAIN) -> None:
        self._schedule = schedule
        self._held = self._optimizer = self._gradients = self._activations = self._step = 0
        self._residue = self._inputs = 0
        self._forward = self._backward = 0  # the most in each pass, without what is there throughout
        self._first = 0  # and in a backward pass in which gradients appear, of several micro-batches in flight
        self._evaluation = self._evaluation_kept = self._evaluation_throughout = 0

    def add(self, cost: BlockCost) -> None:
        """Add a block behind the others."""
        self._forward, self._backward, self._first, self._step = self._moments_with(cost)
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
        schedule = self._schedule
        forward, backward, first, step = self._moments_with(last)
        gradients = self._gradients + last.gradients
        throughout = gradients if schedule.has_gradients else 0
        passes = throughout + max(forward, backward)
        if schedule.in_flight > 1:
            activations = self._activations + last.activations
            other_activations = (schedule.in_flight - 1) * activations
            begins = max(forward, backward if schedule.has_gradients else first)
            passes = max(
                throughout + other_activations + begins, gradients + other_activations - activations + backward
            )
        held = self._held + last.weights + last.optimizer + last.inputs + schedule.buckets(last.gradients)
        evaluation = max(self._evaluation, self._evaluation_kept + last.evaluation)
        evaluation += self._evaluation_throughout + last.evaluation_throughout
        return held + max(passes, gradients + step, evaluation)

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
            first_backward=self._first if self._schedule.in_flight > 1 else 0,
        )

    def _moments_with(self, cost: BlockCost) -> tuple[int, int, int, int]:
        """Return the most in the forward pass, in backward passes and in the step, with `cost` as the last block."""
        forward = max(self._forward, self._activations + cost.forward)
        # Backward comes to this block first, so every moment of the earlier ones has its gradients, too.
        arriving = cost.residue + (0 if self._schedule.accumulating else cost.gradients)
        backward = max(self._backward + arriving, self._activations + cost.backward)
        first = max(
            self._first + cost.residue + cost.gradients, self._activations + (cost.first_backward or cost.backward)
        )
        step = self._step + cost.step if self._schedule.step_at_once else max(self._step, cost.step)
        return forward, backward, first, step


def peak(costs: Iterable[BlockCost], schedule: Schedule = PLAIN) -> int:
    """Return the most bytes that a device holds at once in a training step with these blocks, in forward order.

    Where costs have ranks, these are the order.
    """
    return _composed(in_order(costs, schedule.shares_inputs), schedule).peak()


def peak_terms(costs: Sequence[BlockCost], schedule: Schedule = PLAIN) -> dict[str, int]:
    """Return the terms of `peak(costs, schedule)`, in bytes, at the moment when it occurs."""
    costs = in_order(costs, schedule.shares_inputs)
    gradients = sum(cost.gradients for cost in costs)
    combine = sum if schedule.step_at_once else max
    # Each moment: gradients, activations, and the whole.
    step = combine([cost.step for cost in costs] or [0])
    moments = [(gradients, 0, gradients + step)]
    activations = sum(cost.activations for cost in costs)
    other_activations = (schedule.in_flight - 1) * activations
    forward, backward = _pass_moments(costs, schedule, other_activations, schedule.has_gradients)
    moments += forward + backward
    if schedule.in_flight > 1:  # the second one to go backward; its forward pass was like that of the first
        moments += _pass_moments(costs, schedule, other_activations - activations, True)[1]
    evaluated = sum(cost.evaluation_throughout for cost in costs)
    for cost in costs:
        activations_after = evaluated + cost.evaluation_kept
        moments.append((0, activations_after, evaluated + cost.evaluation))
        evaluated = activations_after
    gradients, activations, total = max(moments, key=lambda moment: moment[2])
    # Not all of a block's activations and gradients need be there at the moment when most is.
    gradients = min(gradients, total)
    activations = min(activations, total - gradients)
    buckets = schedule.buckets(sum(cost.gradients for cost in costs))
    return {
        "weights": sum(cost.weights for cost in costs),
        "gradients": gradients + buckets,
        "optimizer": sum(cost.optimizer for cost in costs),
        "activations": activations + sum(cost.inputs for cost in costs),
        "temporary": total - gradients - activations,
    }


def _pass_moments(
    costs: Sequence[BlockCost], schedule: Schedule, other_activations: int, has_gradients: bool
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Return (gradients, activations, the whole) at each moment of a forward and of a backward pass.

    Args:
        other_activations: bytes of the activations of other micro-batches.
        has_gradients: whether gradients of earlier micro-batches are there.
    """
    activations = 0
    behind = gradients = sum(cost.gradients for cost in costs)
    left = sum(cost.residue for cost in costs)
    forward, backward = [], []
    for cost in costs:
        activations_held = activations + cost.activations
        there = gradients if has_gradients else 0
        forward.append(
            (there, other_activations + activations_held, there + other_activations + activations + cost.forward)
        )
        left -= cost.residue
        grown = gradients if has_gradients else behind
        rest = left + (grown if has_gradients else behind - cost.gradients)
        own = cost.backward
        if schedule.in_flight > 1 and not has_gradients:
            own = cost.first_backward or own
        backward.append((grown, other_activations + activations_held, rest + other_activations + activations + own))
        activations = activations_held
        behind -= cost.gradients
    return forward, backward


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
        self._rows: dict[int, tuple[list[float], Composition, set[int]]] = {}

    def row(self, start: int, limit: float) -> Sequence[float]:
        """Return the peaks with 0, 1, 2, ... blocks from `start` on, in bytes, up to the first above `limit`."""
        if start not in self._rows:
            composition = Composition(self._schedule)
            composition.add(self._first)
            there = self._taken(self._first)
            self._rows[start] = [composition.peak(self._last.sharing(there))], composition, there
        peaks, composition, there = self._rows[start]
        position = start + len(peaks) - 1
        while peaks[-1] <= limit and position < len(self._costs):
            cost = self._costs[position]
            composition.add(cost.sharing(there))
            there |= self._taken(cost)
            peaks.append(composition.peak(self._last.sharing(there)))
            position += 1
        return peaks

    def _taken(self, cost: BlockCost) -> set[int]:
        """Return the tensors that blocks behind `cost` need no copy of, because it has one."""
        return {tensor for tensor, _ in cost.takes} if self._schedule.shares_inputs else set()


def in_order(costs: Iterable[BlockCost], shares_inputs: bool = False) -> list[BlockCost]:
    """Return the costs of one device with a cost for each phase, by rank, and copies of what is there left out.

    Args:
        shares_inputs: whether what comes from another device is copied once, and is there behind the first block.
    """
    phases = sorted((part for cost in costs for part in cost.in_phases()), key=lambda cost: cost.rank)
    given = dict(item for cost in phases for item in cost.gives)
    there = {tensor for tensor, is_kept in given.items() if is_kept}
    shared = []
    for cost in phases if given or shares_inputs else ():
        shared.append(cost.sharing(there))
        # The first block has it all.
        there.update(tensor for tensor, _ in cost.takes if shares_inputs or tensor in given)
    return shared or phases


def merged(costs: Iterable[BlockCost], schedule: Schedule = PLAIN) -> BlockCost:
    """Return the cost of blocks that follow each other on one device, as one."""
    costs = list(costs)
    phases = in_order(costs, schedule.shares_inputs)
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
