"""Each batch of an evaluation is compared with the room that there is, before it runs.

One that is predicted not to fit runs in portions of its sequences, or with outputs on the host, which changes no loss
and no metric. Where that is not exact, or does not help, blocks move.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import log
from ..memory.evaluation import Evaluation
from ..patching.guard import attempt
from ..placement import placed_models, planner
from ..placement.balance import DoesNotFit
from ..placement.plan import Plan
from ..placement.request import Request
from ..rng import undisturbed
from ..upstream.trainer import TrainerLike
from . import batch_check, evaluation_remedy, prediction_steps
from .actual_workload import actual_workload
from .batch_shapes import BatchShapes, on_host, shapes_of
from .current_request import request_for, usable_now
from .evaluation import evaluation_with
from .evaluation_remedy import AS_IT_IS, EvaluationRemedy, EvaluationRoom
from .prediction_steps import CannotJoin, PredictionStep
from .replan import costs_in_force, moved_if_better, plan_in_force

if TYPE_CHECKING:
    from torch import nn

MOST_EXAMINED = 20  # batches of one evaluation; each takes about as long as planning did
# What language models take besides tokens, none of which takes more memory in an evaluation than in training.
OF_TOKENS = frozenset({"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"})


@contextmanager
def checking(
    trainer: TrainerLike,
    loop: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    replanned: Callable[[Plan], None],
) -> Iterator[None]:
    """Look at the batches of an evaluation loop before they run.

    Args:
        trainer: a `transformers.Trainer`.
        loop: the original `evaluation_loop`.
        arguments: what it is called with, positional and by name, the trainer included.
        replanned: takes the plan in force when that has changed.
    """
    placed = placed_models.placed(trainer.model)
    if placed is None:
        yield
        return
    check = attempt(
        "preparing to look at evaluation batches", _Check, trainer, loop, arguments, replanned,
        instead="they run as they are",
    )  # fmt: skip
    if check is None:
        yield
        return

    accumulation = trainer.args.eval_accumulation_steps
    try:
        with prediction_steps.replaced(trainer, check.around):
            yield
    finally:
        trainer.args.eval_accumulation_steps = accumulation


class _Check:
    """The batches of one evaluation loop, and the remedies chosen for them."""

    def __init__(
        self,
        trainer: TrainerLike,
        loop: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
        replanned: Callable[[Plan], None],
    ) -> None:
        self._trainer, self._replanned = trainer, replanned
        bound = inspect.signature(loop).bind(*arguments[0], **arguments[1]).arguments
        dataset: Any = getattr(bound.get("dataloader"), "dataset", None)
        self._dataset_size = len(dataset) if hasattr(dataset, "__len__") else 0
        self._loss_only = bool(bound.get("prediction_loss_only"))
        self._known: list[tuple[BatchShapes, EvaluationRemedy]] = []
        self._hopeless: list[BatchShapes] = []
        self._examined = 0
        self._moved = False

    def around(self, step: PredictionStep) -> PredictionStep:
        """Return a prediction step that looks at its batch first."""

        def prediction_step(model: "nn.Module", inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def perform(inputs: Any) -> Any:
                return step(model, inputs, *args, **kwargs)

            action, instead = "looking at an evaluation batch", "it runs as it is"
            remedy = attempt(action, self._remedy_for, inputs, default=AS_IT_IS, instead=instead)
            if remedy.to_host:
                self._trainer.args.eval_accumulation_steps = 1
            if remedy.portions == 1:
                return perform(inputs)
            try:
                count, to_host = remedy.portions, remedy.to_host
                return tuple(prediction_steps.in_portions(self._trainer, perform, inputs, count, to_host))
            except CannotJoin:
                log.once("warning", "outputs of portions of an evaluation batch do not join; it runs as it is")
                self._known.clear()
                self._examined = MOST_EXAMINED
                return perform(inputs)

        return prediction_step

    def _remedy_for(self, inputs: Any) -> EvaluationRemedy:
        shapes = shapes_of(inputs, None)
        if shapes is None:
            return AS_IT_IS
        for examined, remedy in self._known:
            portions = remedy.portions
            if examined.covers(shapes) and (portions == 1 or self._splits(inputs, portions)):
                return remedy
        if any(shapes.covers(mine) for mine in self._hopeless) or self._examined >= MOST_EXAMINED:
            return AS_IT_IS
        plan = _plan_in_force(self._trainer)
        evaluation = self._evaluation(shapes, plan)
        if evaluation is None or _is_held(plan, evaluation, shapes):
            return AS_IT_IS
        self._examined += 1
        with undisturbed():
            chosen = self._chosen(plan, evaluation, on_host(inputs))
        if chosen is None:
            self._hopeless.append(shapes)
            return AS_IT_IS
        self._known.append((shapes, chosen))
        return chosen

    def _splits(self, inputs: Any, count: int) -> bool:
        return prediction_steps.splits_exactly(self._trainer, inputs, count)

    def _evaluation(self, shapes: BatchShapes, plan: Plan) -> Evaluation | None:
        """Return the evaluation in batches of these shapes; None where there are no sequences."""
        ids = shapes.shapes.get("input_ids", ())
        if len(ids) == 2:
            batch_size, tokens = ids
        else:
            batch_size, tokens = next(iter(shapes.shapes.values()))[0], plan.workload.seq_len
        if not batch_size or not tokens:
            return None
        return evaluation_with(self._trainer, batch_size, tokens, self._loss_only, max(batch_size, self._dataset_size))

    def _chosen(self, plan: Plan, evaluation: Evaluation, batch: dict[str, Any]) -> EvaluationRemedy | None:
        """Return how a batch is to run; log it if that is not as it is. The map may change here."""
        room = _room(self._trainer, plan)
        remedy, as_it_is = room.remedy(evaluation, batch, lambda count: self._splits(batch, count))
        if remedy is None and not self._moved and self._move(room, evaluation, batch):
            self._moved = True
            return AS_IT_IS
        if remedy != AS_IT_IS and as_it_is is not None:
            evaluation_remedy.announce(self._trainer, evaluation, as_it_is, remedy)
        return remedy

    def _move(self, room: EvaluationRoom, evaluation: Evaluation, batch: dict[str, Any]) -> bool:
        """Put another map in force with which training and this evaluation fit; return whether there is one."""
        workload = replace(room.request.workload, evaluation=evaluation)
        request = room.request.with_case(workload=workload, evaluation_batch=batch)
        try:
            outcome = moved_if_better(self._trainer, plan_in_force(request, room.plan))
        except DoesNotFit:
            return False
        if outcome.moved:
            self._replanned(outcome.plan)
        return outcome.moved and not outcome.plan.shortfall


def _plan_in_force(trainer: TrainerLike) -> Plan:
    placed = placed_models.placed(trainer.model)
    assert placed is not None, "looked at before the loop"
    return placed[1].plan


def _is_held(plan: Plan, evaluation: Evaluation, shapes: BatchShapes) -> bool:
    """Whether the plan shows without a trace that an evaluation fits.

    It fits as part of the plan, or because a training step on as many tokens does: that takes more than its forward
    pass without gradients.
    """
    if plan.shortfall or not shapes.shapes.keys() <= OF_TOKENS:
        return False
    planned, workload = plan.workload.evaluation, plan.workload
    if planned is not None:
        same = (planned.returns, planned.joined) == (evaluation.returns, evaluation.joined)
        within = planned.batch_size >= evaluation.batch_size and planned.seq_len >= evaluation.seq_len
        if same and within and planned.accumulated_sequences >= evaluation.accumulated_sequences:
            return True
    tokens = evaluation.batch_size * evaluation.seq_len
    trained = workload.loss == "full" and workload.tokens >= tokens and workload.seq_len >= evaluation.seq_len
    return evaluation.returns == "loss" and trained


def _room(trainer: TrainerLike, plan: Plan) -> EvaluationRoom:
    """Return the predictor of evaluations under the map that `trainer`'s model has now."""
    placed = placed_models.placed(trainer.model)
    assert placed is not None, "looked at before the loop"
    model, (_, _, max_memory, _) = placed
    usable = usable_now(trainer, model, plan, max_memory)
    has_optimizer = bool(getattr(getattr(trainer, "optimizer", None), "state", None))
    latest = batch_check.latest(trainer)
    if latest is not None:
        request: Request = replace(latest.request, devices=usable).in_training()
        return EvaluationRoom(request, planner.costed_in_training(latest.costed), plan, has_optimizer)
    workload, batch = actual_workload(trainer, plan.workload)
    request = request_for(trainer, model, replace(workload, evaluation=None), batch, usable)
    return EvaluationRoom(request, costs_in_force(request, plan.recomputed), plan, has_optimizer)
