"""Plan again when training begins and the workload is known, and move blocks if the gain is large enough."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import log, state
from ..errors import MoveError
from ..map_file import DeviceMap
from ..memory.cost import is_estimate
from ..memory.workload import Workload
from ..placement import fused_head, planner
from ..placement.balance import DoesNotFit
from ..placement.costed_model import CostedModel
from ..placement.places import device_of
from ..placement.plan import Plan, evaluate
from ..placement.recompute import mixer
from ..placement.remedies import what_would_fit
from ..placement.request import Request
from ..placement.timed_balance import is_better
from ..report import plan_report
from ..units import counted, format_size
from ..upstream.trainer import TrainerLike
from . import evaluation_remedy, in_flight, micro_batch, outside, prediction_steps, weight_copies
from .current_request import request_now, usable_now

if TYPE_CHECKING:
    from torch import nn

# Blocks move when that brings the fullest device to this part of what it is, or below; with several micro-batches in
# flight the time of a step.
WORTH_MOVING = 0.97


@dataclass(frozen=True)
class Outcome:
    """The result of planning for a workload.

    Attributes:
        plan: for the real workload and the map that is now in force.
        request: what it was made for.
        costed: the costs that it is made of.
        moved: whether that map is a new one.
        broken: whether that map does not run: a dry run shows so, or it parts the embedding from what the script feeds
            it with.
        waits: whether the first batch has to show its shapes before anything is decided.
    """

    plan: Plan
    request: Request
    costed: CostedModel
    moved: bool = False
    broken: bool = False
    waits: bool = False


def second_pass(
    trainer: TrainerLike,
    model: "nn.Module",
    assumed: Plan,
    max_memory: Mapping[Any, Any] | None = None,
    may_wait: bool = False,
) -> Outcome:
    """Plan for the real workload of `trainer` and log the plan; move the blocks of `model` where that pays.

    Args:
        trainer: a `transformers.Trainer` about to train.
        model: the model that was placed: the trainer's, or one inside of it.
        assumed: the plan that it was placed by.
        max_memory: what the script passed to `from_pretrained`.
        may_wait: whether somebody looks at the first batch. Then nothing is done for a guess.
    """
    settings = state.settings()
    usable = usable_now(trainer, model, assumed, max_memory)
    if settings.micro_batch == "auto":
        micro_batch.take_largest(trainer, lambda: _fits(request_now(trainer, model, assumed, usable), assumed))
    if settings.pipeline == "auto":
        in_flight.take_largest(trainer, lambda: _fits(request_now(trainer, model, assumed, usable), assumed))
    request = request_now(trainer, model, assumed, usable)
    outcome = plan_in_force(request, assumed)
    outcome = replace(outcome, waits=may_wait and request.case.batch is None and request.workload.guessed)
    if settings.report != "off":
        log.info(plan_report.workload_comparison(assumed, outcome.plan, outcome.waits))
    return outcome if outcome.waits else warned(trainer, moved_if_better(trainer, outcome))


def plan_in_force(request: Request, assumed: Plan) -> Outcome:
    """Return the plan for `request` under the map of `assumed`, with the layers recomputed that it takes now."""
    costed, recomputed = planner.costed_for(request)
    plan, broken = _as_it_is(request, costed, recomputed, assumed)
    return Outcome(plan, request, costed, broken=broken)


def moved_if_better(trainer: TrainerLike, outcome: Outcome, for_any_gain: bool = False) -> Outcome:
    """Return the outcome with the blocks of the model moved, where that pays; maps of the user's stay.

    Args:
        for_any_gain: whether blocks move to the best map whatever it gains: the one in force rests on a guess.
    """
    plan = outcome.plan
    # An estimate is no reason to give up a map that was made from a trace.
    if plan.is_ours and len(set(plan.device_map.values())) > 1 and not plan.is_estimate:
        return _better(trainer, outcome, for_any_gain)
    return outcome


def warned(trainer: TrainerLike, outcome: Outcome) -> Outcome:
    """Return the outcome; if it does not fit, warn first, with the changes under which it would."""
    if outcome.plan.shortfall and not _evaluation_is_remedied(trainer, outcome):
        line = plan_report.shortfall_line(outcome.plan, what_would_fit(outcome.plan, outcome.request))
        log.warning(line, "does not fit")
    return outcome


def _evaluation_is_remedied(trainer: TrainerLike, outcome: Outcome) -> bool:
    """Whether only the evaluation does not fit and will run in a way that does, which is logged."""
    evaluation = outcome.plan.workload.evaluation
    training, costed = outcome.request.in_training(), planner.costed_in_training(outcome.costed)
    alone = evaluate(outcome.plan.mode, costed, outcome.plan.device_map, training.devices)
    if evaluation is None or alone.shortfall:
        return False
    batch = outcome.request.case.evaluation_batch

    def splits(count: int) -> bool:
        if batch is None:
            return prediction_steps.split_exactly(trainer)
        return prediction_steps.splits_exactly(trainer, batch, count)

    room = evaluation_remedy.EvaluationRoom(training, costed, outcome.plan)
    remedy, as_it_is = room.remedy(evaluation, batch, splits)
    if remedy is None or remedy == evaluation_remedy.AS_IT_IS or as_it_is is None:
        return False
    evaluation_remedy.announce(trainer, evaluation, as_it_is, remedy)
    return True


def costs_in_force(request: Request, recomputed: frozenset[str] | None) -> CostedModel:
    """Return the costs for `request` with these layers recomputed; None: as the workload has it."""
    if recomputed is None:
        return planner.cost(request)
    plain, everywhere = (
        planner.cost(request.with_workload(gradient_checkpointing=checkpoints)) for checkpoints in (False, True)
    )
    return mixer(plain, everywhere)(recomputed)


def _as_it_is(
    request: Request, costed: CostedModel, recomputed: frozenset[str] | None, assumed: Plan
) -> tuple[Plan, bool]:
    """Return the plan of the map in force, for the facts known now, and whether that map does not run."""
    if is_estimate(costed.source) and _is_scalable(assumed, request.workload):
        return _scaled(assumed, request.workload), False
    placed = {block.name: device_of(block.name, assumed.device_map) for block in costed.blocks}
    places: DeviceMap = {name: place for name, place in placed.items() if isinstance(place, int)}
    if assumed.is_ours and len(places) == len(placed):
        verified = planner.as_verified(request, costed, places, recomputed)
        first_device = request.devices[0].index
        strays = any(places.get(name, first_device) != first_device for name in request.constraints.on_first)
        # A kernel that gets the addresses of two devices stops in no way that could be repaired.
        parted = fused_head.breaks(verified.plan, request.constraints, costed)
        return replace(verified.plan, device_map=assumed.device_map), bool(verified.met) or strays or parted
    return replace(evaluate(assumed.mode, costed, assumed.device_map, request.devices), recomputed=recomputed), False


def _fits(request: Request, assumed: Plan) -> bool:
    """Whether a training fits: under the best map, or under the user's own if he has given one.

    No micro-batch is a remedy for an evaluation.
    """
    request = request.in_training()
    try:
        costed, recomputed = planner.costed_for(request)
        if not assumed.is_ours:
            return not evaluate(assumed.mode, costed, assumed.device_map, request.devices).shortfall
        plan = planner.solved(request, costed, recomputed)
    except DoesNotFit:
        return False
    return plan is not None and not plan.shortfall


def _is_scalable(assumed: Plan, workload: Workload) -> bool:
    """Whether `assumed` was traced for a workload that differs from this one in little but its number of tokens."""
    alike = ("tuning", "optimizer", "gradient_checkpointing", "autocast", "loss")
    return not assumed.is_estimate and all(getattr(assumed.workload, name) == getattr(workload, name) for name in alike)


def _scaled(assumed: Plan, workload: Workload) -> Plan:
    """Return the traced plan of the first pass for another number of tokens.

    Better than a formula where the Trainer has put kernels into the model that cannot be traced.
    """
    factor = workload.tokens / assumed.workload.tokens
    with_tokens = ("activations", "temporary")
    devices = tuple(
        replace(
            device,
            terms={name: int(size * factor) if name in with_tokens else size for name, size in device.terms.items()},
        )
        for device in assumed.devices
    )
    note = "the model cannot be traced as it trains; the figures are those of loading, scaled by the number of tokens"
    return replace(assumed, workload=workload, devices=devices, notes=(*assumed.notes, note), source="formula")


def _better(trainer: TrainerLike, outcome: Outcome, for_any_gain: bool) -> Outcome:
    """Move the blocks if another map is better by a useful margin."""
    request, actual = outcome.request, outcome.plan
    better = planner.solved(request, outcome.costed, actual.recomputed)
    if better is None or better.device_map == actual.device_map:
        return outcome
    gains = for_any_gain and not is_better(actual, better)
    if not (outcome.broken or gains or worth_moving(actual, better)):
        return outcome
    if len(set(better.device_map.values())) == 1:
        return outcome
    reason = weight_copies.reason_to_stay(trainer)
    if reason:
        log.info(f"a better map was found for this workload, but {reason}; training continues with its map")
        return outcome
    try:
        moved = outside.move_along(trainer, request.model, better.device_map)
    except MoveError as error:
        log.warning(f"a better map was found for this workload, but {error}; training continues with its map")
        return outcome
    if state.settings().report != "off":
        log.info(
            f"moved {counted(len(moved.blocks), 'block')} ({format_size(moved.size)}) for this workload: "
            f"{_shorter_step(better, actual)}fullest device {plan_report.worst_devices(better, actual)}",
            "move",
        )
    return replace(outcome, plan=better, moved=True, broken=False)


def _shorter_step(better: Plan, now: Plan) -> str:
    """Return by what the step is shorter, if that is why blocks move; "" otherwise."""
    new, old = better.step_time, now.step_time
    if better.workload.in_flight < 2 or new is None or old is None or new.seconds >= old.seconds:
        return ""
    return f"predicted step {new.seconds:.3g} s instead of {old.seconds:.3g} s, "


def worth_moving(now: Plan, better: Plan) -> bool:
    """Whether blocks should move from the map of one plan to that of another."""
    if bool(now.shortfall) != bool(better.shortfall):
        return bool(now.shortfall)
    if not now.shortfall and now.workload.in_flight > 1 and now.step_time is not None and better.step_time is not None:
        return better.step_time.seconds <= WORTH_MOVING * now.step_time.seconds
    return better.worst.filled <= WORTH_MOVING * now.worst.filled
