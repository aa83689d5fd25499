"""Repair a map after a cross-device error: undo the step, change the map, and repeat the step.

Two blocks whose tensors meet outside of any module need one device. A dry run finds most of them; what it could not
reach (a batch of another kind, a loss of the script's own) shows in a step. `repaired_plan` chooses the other map,
`repeated_step` runs the micro-batches of the step again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import cache, devices, log, rng, state
from ..errors import LostModelError, MoveError
from ..patching.guard import attempt
from ..placement import colocations, placed_models
from ..placement.plan import Plan
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from . import crossing, outside, weight_copies
from .actual_workload import actual_workload
from .current_request import request_for, usable_now
from .prediction_steps import PredictionStep, replaced
from .repaired_plan import repaired_plan
from .repeated_step import MicroBatch, Perform, Step, remembered, run_again, within_a_step
from .replan import costs_in_force

if TYPE_CHECKING:
    from torch import nn

MOST_REPAIRS = 6  # in one training

_STEP: Part[Step] = Part("the step under way")
_EVALUATION: Part[Step] = Part("repairs in evaluations", outlives=True)


def run(
    trainer: TrainerLike,
    perform: Perform,
    model: "nn.Module",
    inputs: Any,
    replanned: Callable[[Plan], None],
) -> Any:
    """Return `perform(inputs)`, the loss of a micro-batch; where it stops across devices, after a repair of the map.

    Args:
        trainer: a `transformers.Trainer` in training.
        perform: runs forward and backward pass of one micro-batch.
        model: as wrapped as it is in the step.
        inputs: of the micro-batch.
        replanned: takes the plan of a map that has been put in force.

    Raises:
        Exception: what `perform` raises; of a cross-device error the first one, where no map helps.
    """
    if not _may_repair(trainer):
        with _explained(trainer):
            return perform(inputs)
    current = attempt("preparing to repair a step", remembered, inputs, instead="a step that stops is not repeated")
    if current is None:
        return perform(inputs)
    step = _STEP.of(trainer) or _STEP.keep(trainer, Step())
    try:
        try:
            loss = perform(inputs)
        except Exception as failure:
            if not crossing.is_cross_device(failure):
                raise
            loss = _repaired(_Case(trainer, perform, model, step, current, replanned), failure)
    except BaseException:
        step.done = []  # the Trainer may begin anew
        raise
    step.done = [] if trainer.accelerator.sync_gradients else [*step.done, current]
    return loss


def ran(trainer: TrainerLike, batch: MicroBatch) -> None:
    """Take note of a micro-batch of the step that has run without `run`."""
    if _may_repair(trainer):
        step = _STEP.of(trainer) or _STEP.keep(trainer, Step())
        step.done = [] if trainer.accelerator.sync_gradients else [*step.done, batch]


@contextmanager
def repairing_evaluation(trainer: TrainerLike, replanned: Callable[[Plan], None]) -> Iterator[None]:
    """Have the trainer's prediction steps repaired; see `run` for the arguments."""

    def around(perform_step: PredictionStep) -> PredictionStep:
        def prediction_step(model: "nn.Module", inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def perform(inputs: Any) -> Any:
                return perform_step(model, inputs, *args, **kwargs)

            return _evaluated(trainer, perform, model, inputs, replanned)

        return prediction_step

    with replaced(trainer, around):
        yield


def _evaluated(
    trainer: TrainerLike,
    perform: Perform,
    model: "nn.Module",
    inputs: Any,
    replanned: Callable[[Plan], None],
) -> Any:
    """Return `perform(inputs)`, of a prediction step; where it stops across devices, after a repair of the map."""
    if not _may_repair(trainer):
        return perform(inputs)
    current = attempt("preparing to repair a step", remembered, inputs, instead="a step that stops is not repeated")
    if current is None:
        return perform(inputs)
    try:
        return perform(inputs)
    except Exception as failure:
        if not crossing.is_cross_device(failure):
            raise
        step = _EVALUATION.of(trainer) or _EVALUATION.keep(trainer, Step())
        return _repaired(_Case(trainer, perform, model, step, current, replanned, False), failure)


def _may_repair(trainer: TrainerLike) -> bool:
    """Whether the model of `trainer` was placed on several devices, and by this process alone."""
    placed = placed_models.placed(trainer.model)
    return placed is not None and trainer.args.world_size == 1 and len(set(placed[1].plan.device_map.values())) > 1


@contextmanager
def _explained(trainer: TrainerLike) -> Iterator[None]:
    """Tell why a step of a replica that stops across devices is not repeated: the other ranks would not repeat it."""
    try:
        yield
    except Exception as failure:
        if trainer.args.world_size > 1 and crossing.is_cross_device(failure):
            log.error_of_any_rank(
                "this step met tensors of two devices, and maps of replicas are not repaired; train once without "
                "replicas, which repairs the map and remembers what has to share a device"
            )
        raise


class _Case(NamedTuple):
    """A step to be repaired. See `run`; `trains` is false in an evaluation, which has no gradients."""

    trainer: TrainerLike
    perform: Perform
    model: "nn.Module"
    step: Step
    current: MicroBatch
    replanned: Callable[[Plan], None]
    trains: bool = True


def _repaired(case: _Case, failure: Exception) -> Any:
    """Return the loss of the step under a map on which it runs.

    Raises:
        Exception: `failure`, if there is none; another kind of error of the repeated step.
    """
    latest: Exception = failure
    while True:
        changed = attempt(
            "repairing the device map", _change_map, case, latest, default=False, instead="the error is the program's"
        )
        if not changed:
            raise failure
        try:
            for before in case.step.done:
                with within_a_step(case.trainer):
                    run_again(case.perform, before)
            return run_again(case.perform, case.current)
        except Exception as next_failure:
            if not crossing.is_cross_device(next_failure):
                raise
            latest = next_failure


def _change_map(case: _Case, failure: Exception) -> bool:
    """Put a map in force that colocates the blocks that met in `failure`; return whether there is one."""
    placed = placed_models.placed(case.trainer.model)
    kind = devices.accelerator_type()
    assert placed is not None and kind is not None, "looked at before the step"
    model, (plan, _, max_memory, _) = placed
    usable = usable_now(case.trainer, model, plan, max_memory)
    workload, batch = actual_workload(case.trainer, plan.workload)
    request = request_for(case.trainer, model, workload, batch, usable)
    with rng.undisturbed():
        costed = costs_in_force(request, plan.recomputed)
        names = [block.name for block in costed.blocks]
        met_tensors = crossing.crossing_of(failure, model, names, kind, usable[0].index)
        met = _words(met_tensors, kind)
        if plan.is_users:
            log.warning(f"{met} met on different devices; the map that was given is not changed")
            return False
        if case.step.repairs >= MOST_REPAIRS:
            return False
        case.step.repairs += 1
        _undo(case, failure)
        reason = weight_copies.reason_to_stay(case.trainer)
        if reason:
            log.warning(f"{met} met on different devices, but {reason}; the map stays")
            return False
        repaired = repaired_plan(case.trainer, case.current.inputs, request, costed, plan, met_tensors)
    if repaired is None:
        return False
    try:
        outside.move_along(case.trainer, model, repaired.plan.device_map)
    except LostModelError:
        raise
    except MoveError as error:
        log.warning(f"{met} met on different devices, but {error}; the map stays")
        return False
    note = f"{met} met on different devices in {'a step' if case.trains else 'an evaluation'}: {repaired.change}"
    log.warning(f"{note}, and the step is repeated; nothing is lost", "repair")
    case.replanned(replace(repaired.plan, notes=(*repaired.plan.notes, note)))
    colocations.remember(model, repaired.colocations, cache.folder_of(state.settings().cache))
    return True


def _undo(case: _Case, failure: Exception) -> None:
    """Drop the gradients of the pass that failed, and the activations that its frames hold."""
    crossing.let_go(failure)
    if case.trains:
        case.model.zero_grad(set_to_none=True)


def _words(met_tensors: crossing.Crossing, kind: str) -> str:
    names = sorted(name for name in met_tensors.blocks if name is not None)
    if len(met_tensors.blocks) > 1:
        return " and ".join([*names, *(["the inputs"] if None in met_tensors.blocks else [])])
    places = " and ".join(f"{kind}:{index}" for index in sorted(met_tensors.devices))
    return f"tensors of {places}" if places else "tensors"
