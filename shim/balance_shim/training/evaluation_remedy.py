"""Under which an evaluation fits that is predicted not to: outputs on the host, or batches in portions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import log
from ..memory.cost import BlockCost
from ..memory.evaluation import Evaluation
from ..placement import evaluated
from ..placement.costed_model import CostedModel
from ..placement.plan import Plan, evaluate
from ..placement.request import Request
from ..training_run import Part
from ..units import format_size
from ..upstream.trainer import TrainerLike
from . import portions

_ANNOUNCED: Part[set[bool]] = Part("whether there was a remedy for an evaluation", outlives=True)


@dataclass(frozen=True)
class EvaluationRemedy:
    """How an evaluation runs that would not fit as it is.

    Attributes:
        portions: in how many portions the sequences of a batch run.
        to_host: whether outputs go to host memory after each batch, as with `eval_accumulation_steps=1`, and after each
            portion.
    """

    portions: int = 1
    to_host: bool = False

    def __str__(self) -> str:
        phrases = []
        if self.portions > 1:
            phrases.append(f"its batches run in {self.portions} portions")
        if self.to_host:
            phrases.append("its outputs go to host memory at once, as with eval_accumulation_steps=1")
        return ", and ".join(phrases) or "it runs as it is"


AS_IT_IS = EvaluationRemedy()


@dataclass(frozen=True)
class EvaluationRoom:
    """The map in force, and the prediction whether an evaluation fits under it.

    Attributes:
        request: of the training, or of the model as it is now; its own evaluation does not count.
        costed: of the same, with or without an evaluation.
        plan: the map in force.
        has_optimizer: whether the optimizer's state exists by then.
    """

    request: Request
    costed: CostedModel
    plan: Plan
    has_optimizer: bool = True

    def planned(self, evaluation: Evaluation, batch: Mapping[str, Any] | None) -> Plan | None:
        """Return the plan for an evaluation alone; None if its memory is unknown.

        Args:
            batch: what the model gets in it; None: sequences like those of training.
        """
        workload = replace(self.request.workload, evaluation=evaluation)
        request = self.request.with_case(workload=workload, evaluation_batch=batch)
        costed = evaluated.with_evaluation(request, self.costed)
        if costed.workload.evaluation != evaluation:
            return None
        return evaluate(self.plan.mode, self._alone(costed), self.plan.device_map, self.request.devices)

    def remedy(
        self, evaluation: Evaluation, batch: Mapping[str, Any] | None, splits: Callable[[int], bool]
    ) -> tuple[EvaluationRemedy | None, Plan | None]:
        """Return the mildest remedy with which an evaluation fits, and the plan for it as it is.

        Args:
            splits: count -> whether that many portions give what the whole batch gives.

        Returns:
            No remedy if there is none; no plan if what the evaluation takes is unknown.
        """
        plan = self.planned(evaluation, batch)
        if plan is None or not plan.shortfall:
            return AS_IT_IS, plan
        piles_up = evaluation.returns != "loss" and evaluation.piles_up
        if piles_up:
            evaluation = replace(evaluation, accumulated_sequences=evaluation.batch_size)
            alone = self.planned(evaluation, batch)
            if alone is not None and not alone.shortfall:
                return EvaluationRemedy(to_host=True), plan
        counts = [count for count in range(2, evaluation.batch_size + 1) if splits(count)]
        count = self._least_fitting(counts, evaluation, batch)
        return (EvaluationRemedy(count, evaluation.returns == "logits") if count else None), plan

    def _least_fitting(self, counts: Sequence[int], evaluation: Evaluation, batch: Mapping[str, Any] | None) -> int:
        """Return the first of `counts`, in rising order, with which the evaluation fits; 0: none."""
        low, high = 0, len(counts)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits_in(counts[middle], evaluation, batch) else (middle + 1, high)
        return counts[low] if low < len(counts) else 0

    def _fits_in(self, count: int, evaluation: Evaluation, batch: Mapping[str, Any] | None) -> bool:
        batch_size = evaluation.batch_size
        largest = -(-batch_size // count)
        portion = replace(evaluation, batch_size=largest, accumulated_sequences=largest)
        if evaluation.returns == "reduced":
            # The script's function gets the whole batch: outputs of the portions stay on the device, and are joined.
            portion = replace(portion, returns="logits", accumulated_sequences=batch_size, joined=True)
        part = None
        if batch is not None and portions.batch_size_of(batch) == batch_size:
            part = max(
                portions.split(batch, batch_size, count), key=lambda candidate: portions.batch_size_of(candidate) or 0
            )
        plan = self.planned(portion, part)
        return plan is not None and not plan.shortfall

    def _alone(self, costed: CostedModel) -> CostedModel:
        """Return the costs without those of training steps, of which an evaluation sees weights and optimizer only."""

        def alone(cost: BlockCost) -> BlockCost:
            return BlockCost(
                weights=cost.weights,
                optimizer=cost.optimizer if self.has_optimizer else 0,
                evaluation=cost.evaluation,
                evaluation_kept=cost.evaluation_kept,
                evaluation_throughout=cost.evaluation_throughout,
            )

        costs = tuple(map(alone, costed.costs))
        return replace(costed, costs=costs, first=alone(costed.first), records=(), first_record=None)


def announce(trainer: TrainerLike, evaluation: Evaluation, plan: Plan, remedy: EvaluationRemedy | None) -> None:
    """Warn, once a trainer, of an evaluation that does not fit as it is; and once more where nothing helps.

    Args:
        plan: for the evaluation as it is.
        remedy: how it runs; None: there is none.
    """
    announced = _ANNOUNCED.of(trainer)
    if announced is None:
        announced = _ANNOUNCED.keep(trainer, set())
    if (remedy is not None) in announced:
        return
    announced.add(remedy is not None)
    worst = plan.worst
    problem = (
        f"the evaluation ({evaluation}) is predicted not to fit ({worst.name}: {format_size(worst.predicted_peak)} of "
        f"{format_size(worst.capacity)})"
    )
    if remedy is None:
        log.warning(f"{problem} and runs as it is; a smaller per_device_eval_batch_size, or more devices would help")
    else:
        log.warning(f"{problem}, so {remedy}; losses and metrics stay as they are")
