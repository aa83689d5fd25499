"""Compare each micro-batch with those that the plan in force holds for, before it runs.

Where the data could not be looked at ahead of training, the first batch decides: the plan is made again for its
shapes. Later ones are examined only if they are larger than all that the plan is known to hold: one that is predicted
not to fit gets another map, or runs in portions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import log, state
from ..patching.guard import attempt
from ..placement import planner
from ..placement.balance import DoesNotFit
from ..placement.costed_model import CostedModel
from ..placement.plan import Plan, evaluate
from ..placement.remedies import what_would_fit
from ..placement.request import Request
from ..replicas import ranks
from ..report import plan_report
from ..rng import undisturbed
from ..training_run import Part
from ..units import format_size
from ..upstream.trainer import TrainerLike
from . import checkpointing, portions
from .actual_workload import actual_workload
from .batch_shapes import inputs_of, on_host, shapes_of, with_length
from .current_request import evaluating, request_for, usable_now
from .known_batches import KnownBatches
from .replan import Outcome, costs_in_force, moved_if_better, plan_in_force, second_pass, warned

if TYPE_CHECKING:
    pass

HEADROOM = 1.25  # times the length that needs another map: the next that is a little longer should not need one more
MOST_MOVES = 3  # of blocks for later batches
MOST_EXAMINED = 40  # batches of one training; each takes about as long as planning did


def begin(
    trainer: TrainerLike,
    outcome: Outcome,
    max_memory: Mapping[Any, Any] | None,
    replanned: Callable[[Plan], None],
) -> None:
    """Check the batches of a training of `trainer`, whose model the shim has placed.

    Args:
        outcome: of the second pass.
        max_memory: what the script passed to `from_pretrained`.
        replanned: takes the plan in force when that has changed.
    """
    _CHECK.keep(trainer, BatchCheck(trainer, outcome, max_memory, replanned))


def looks_at(trainer: TrainerLike) -> bool:
    """Whether batches of `trainer` are examined: not where several processes share one model."""
    return bool(trainer.args.world_size == 1 or ranks.has_own_devices())


def portions_for(trainer: TrainerLike, inputs: Any, counted: bool) -> int:
    """Return the number of portions in which a micro-batch should run; the map may change here.

    Args:
        inputs: what `training_step` gets.
        counted: whether the Trainer has counted the label tokens of the step.
    """
    check = _CHECK.of(trainer)
    if check is None:
        return 1
    action, instead = "looking at the batch before it runs", "the batch runs as it is"
    return int(attempt(action, check.portions_for, inputs, counted, default=1, instead=instead))


def replanned(trainer: TrainerLike, plan: Plan) -> None:
    """Take the plan of a map that something else has put in force."""
    check = _CHECK.of(trainer)
    if check is not None:
        check.take_plan(plan)


def latest(trainer: TrainerLike) -> Outcome | None:
    """Return the request and costs that the plan in force was made from; None outside of a training."""
    check = _CHECK.of(trainer)
    return None if check is None else check.latest


class BatchCheck:
    """The checks of the batches of one call of `Trainer.train`."""

    def __init__(
        self,
        trainer: TrainerLike,
        outcome: Outcome,
        max_memory: Mapping[Any, Any] | None,
        replanned: Callable[[Plan], None],
    ) -> None:
        self._trainer, self._model = trainer, outcome.request.model
        self._max_memory, self._replanned = max_memory, replanned
        self._plan, self._usable = outcome.plan, outcome.request.devices
        self.latest = outcome
        self._names = inputs_of(self._model)
        self._unseen, self._waits = outcome.request.case.batch is None, outcome.waits
        self._known = KnownBatches()
        self._examined = self._moves = 0
        self._evaluates = True
        self._warned = self._told_of_portions = False
        if not self._unseen:
            outcome = self._kept_in_training(outcome)
            if not outcome.plan.shortfall:
                self._note(outcome.request.case.batch, outcome.costed)

    def take_plan(self, plan: Plan) -> None:
        """Take the plan of a map that something else has put in force."""
        self._plan = plan

    def portions_for(self, inputs: Any, counted: bool) -> int:
        shapes = shapes_of(inputs, self._names)
        if shapes is None:
            self._decide_without()
            return 1
        if self._known.fits(shapes):
            return 1
        count = self._known.portions(shapes)
        if count and portions.splits_exactly(self._trainer, inputs, count, counted):
            return count
        if self._known.is_hopeless(shapes) or self._examined >= MOST_EXAMINED:
            return 1
        self._examined += 1
        with undisturbed():
            batch = on_host(inputs)
            self._usable = usable_now(self._trainer, self._model, self._plan, self._max_memory)
            count = self._first(batch, counted) if self._unseen else self._later(batch, counted)
        self._unseen = self._waits = False
        return count

    def _decide_without(self) -> None:
        """Take the decision that waited for a first batch, where that has no shapes, such as one of texts."""
        if self._waits:
            self._waits = False
            outcome = second_pass(self._trainer, self._model, self._plan, self._max_memory)
            self._put_in_force(outcome)

    def _first(self, batch: dict[str, Any], counted: bool) -> int:
        """Plan for the first batch; with sequences as long as are known to come, if that fits."""
        expected = 0 if self._plan.workload.guessed else self._plan.workload.seq_len
        longest = with_length(batch, expected)
        assumed = self._plan
        outcome = plan_in_force(self._request(longest), assumed)
        if state.settings().report != "off" and assumed.workload.differences(outcome.plan.workload):
            log.info(f"first batch: {plan_report.workload_comparison(assumed, outcome.plan)}")
        outcome = self._kept_in_training(moved_if_better(self._trainer, outcome, assumed.workload.guessed))
        if outcome.plan.shortfall and shapes_of(longest, None) != shapes_of(batch, None):
            exact = plan_in_force(self._request(batch), outcome.plan)
            exact = moved_if_better(self._trainer, exact)
            if not exact.plan.shortfall:
                outcome, longest = exact, batch
        self._put_in_force(outcome)
        if not outcome.plan.shortfall:
            self._note(longest, outcome.costed)
            return 1
        return self._in_portions(batch, counted, outcome)

    def _kept_in_training(self, outcome: Outcome) -> Outcome:
        """Return the outcome, for training alone if it is the evaluation that does not fit.

        A warning has been logged then, and no remedy for a micro-batch is one for an evaluation.
        """
        evaluation = outcome.plan.workload.evaluation
        if evaluation is None or not outcome.plan.shortfall:
            return outcome
        costed = planner.costed_in_training(outcome.costed)
        plan = evaluate(outcome.plan.mode, costed, outcome.plan.device_map, outcome.request.devices)
        if plan.shortfall:
            return outcome
        self._evaluates = False
        if self._unseen:
            warned(self._trainer, outcome)
        return replace(outcome, plan=replace(plan, recomputed=outcome.plan.recomputed), costed=costed)

    def _later(self, batch: dict[str, Any], counted: bool) -> int:
        """Return the number of portions for a batch that is larger than all before; the map may change."""
        request = self._request(batch)
        costed = costs_in_force(request, self._plan.recomputed)
        plan = evaluate(self._plan.mode, costed, self._plan.device_map, request.devices)
        if not plan.shortfall:
            self._note(batch, costed)
            return 1
        if self._moves < MOST_MOVES:
            length = request.workload.seq_len
            for target in (with_length(batch, int(HEADROOM * length)), batch):
                outcome = self._moved_for(self._request(target))
                if outcome is not None:
                    self._moves += 1
                    self._note(target, outcome.costed)
                    return 1
        return self._in_portions(batch, counted, Outcome(plan, request, costed))

    def _moved_for(self, request: Request) -> Outcome | None:
        """Put another map, or more recomputation, in force with which `request` fits; None if there is none."""
        try:
            outcome = plan_in_force(request, self._plan)
            if outcome.plan.shortfall:
                better = planner.solved(request, outcome.costed, outcome.plan.recomputed)
                if better is None or better.shortfall:
                    return None
        except DoesNotFit:
            return None
        outcome = moved_if_better(self._trainer, outcome)
        if outcome.plan.shortfall:  # something speaks against moving
            return None
        self._put_in_force(outcome)
        return outcome

    def _in_portions(self, batch: dict[str, Any], counted: bool, undivided: Outcome) -> int:
        """Return the least number of portions with which `batch` fits; 1, with a warning, if there is none."""
        batch_size = portions.batch_size_of(batch) or 1
        counts = [
            number
            for number in range(2, batch_size + 1)
            if portions.splits_exactly(self._trainer, batch, number, counted)
        ]
        count = self._least_fitting(counts, batch, batch_size)
        if not count and counts and (self._unseen or self._moves < MOST_MOVES):
            outcome = self._moved_for(self._portion(counts[-1], batch, batch_size))
            if outcome is not None:
                self._moves += 1
                count = self._least_fitting(counts, batch, batch_size)
        shapes = shapes_of(batch, self._names)
        assert shapes is not None, "only batches with shapes get here"
        plan = undivided.plan
        if count:
            self._known.add_split(shapes, count)
            worst = plan.worst
            if self._unseen:  # and nothing has been measured or moved for other batches
                outcome = plan_in_force(self._portion(count, batch, batch_size), self._plan)
                self._put_in_force(moved_if_better(self._trainer, outcome))
            if self._told_of_portions:
                return count
            self._told_of_portions = True
            log.warning(
                f"micro-batches as large as the one of {plan.workload.batch_size} x {plan.workload.seq_len} tokens are "
                f"predicted not to fit ({worst.name}: {format_size(worst.predicted_peak)} of "
                f"{format_size(worst.capacity)}) and run in portions; the losses do not change",
                "portions",
            )
            return count
        self._known.add_hopeless(shapes)
        if not self._warned:
            self._warned = True
            line = plan_report.shortfall_line(plan, what_would_fit(plan, undivided.request))
            log.warning(
                f"a batch of {plan.workload.batch_size} x {plan.workload.seq_len} tokens runs as it is; {line}",
                "does not fit",
            )
        return 1

    def _least_fitting(self, counts: list[int], batch: dict[str, Any], batch_size: int) -> int:
        """Return the first of `counts`, in rising order, with which `batch` fits under the map in force; 0: none."""
        low, high = 0, len(counts)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits_in(counts[middle], batch, batch_size) else (middle + 1, high)
        return counts[low] if low < len(counts) else 0

    def _fits_in(self, count: int, batch: dict[str, Any], batch_size: int) -> bool:
        request = self._portion(count, batch, batch_size)
        costed = costs_in_force(request, self._plan.recomputed)
        return not evaluate(self._plan.mode, costed, self._plan.device_map, request.devices).shortfall

    def _portion(self, count: int, batch: dict[str, Any], batch_size: int) -> Request:
        """Return the request for the largest of `count` portions of `batch`."""
        largest = max(
            portions.split(batch, batch_size, count), key=lambda portion: portions.batch_size_of(portion) or 0
        )
        request = self._request(largest)
        # Behind the first portion there are gradients, as with accumulation.
        return request.with_workload(accumulation=count * request.workload.accumulation)

    def _request(self, batch: dict[str, Any]) -> Request:
        workload, _ = actual_workload(self._trainer, self._plan.workload, batch)
        if not self._evaluates:
            workload = replace(workload, evaluation=None)
            return request_for(self._trainer, self._model, workload, batch, self._usable)
        workload, evaluation_batch = evaluating(self._trainer, workload)
        return request_for(self._trainer, self._model, workload, batch, self._usable, evaluation_batch)

    def _put_in_force(self, outcome: Outcome) -> None:
        before, self._plan, self.latest = self._plan, outcome.plan, outcome
        checkpointing.choose_again(self._trainer, self._model, before, outcome.plan)
        self._replanned(outcome.plan)

    def _note(self, batch: Any, costed: CostedModel) -> None:
        """Remember that the plan in force holds for `batch`, and for how much longer ones it does."""
        shapes = shapes_of(batch, self._names)
        if shapes is not None:
            self._known.add_fitting(shapes, self._plan, costed)


_CHECK: Part[BatchCheck] = Part("looking at batches")
