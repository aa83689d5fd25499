"""Repair a map after a cross-device error: undo the step, change the map, and repeat the step.

Two blocks whose tensors meet outside of any module need one device. A dry run finds most of them; what it could not
reach (a batch of another kind, a loss of the script's own) shows in a step. First the blocks that met are colocated,
then all that is no layer is put on the first device, then the library's own map is put in force, and at last, if it
fits there, the model is put on one device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import cache, devices, log, rng, state
from ..errors import LostModelError, MoveError
from ..map_file import DeviceMap
from ..memory.blocks import Block
from ..memory.colocation import Constraints, of_all_but_layers
from ..memory.structure import ModelStructure
from ..patching.guard import attempt
from ..placement import colocations, compared_heads, placed_models, planner, verification
from ..placement.balance import DoesNotFit
from ..placement.costed_model import CostedModel
from ..placement.library_map import library_map
from ..placement.plan import Plan, device_of, evaluate
from ..placement.request import Request
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from . import crossing, outside, weight_copies
from .actual_workload import actual_workload
from .batch_shapes import on_host
from .prediction_steps import PredictionStep, replaced
from .replan import costs_in_force, request_for, usable_now

if TYPE_CHECKING:
    from torch import nn

MOST_REPAIRS = 6  # in one training

Perform = Callable[[Any], Any]


class _MicroBatch(NamedTuple):
    """A micro-batch of the step under way: what goes in, and the random state ahead of it."""

    inputs: Any
    randomness: tuple[Any, ...]


class Step:
    """The optimizer step that a trainer is in."""

    def __init__(self) -> None:
        self.done: list[_MicroBatch] = []
        self.repairs = 0


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
    current = attempt("preparing to repair a step", _remembered, inputs, instead="a step that stops is not repeated")
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
    current = attempt("preparing to repair a step", _remembered, inputs, instead="a step that stops is not repeated")
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
def _explained(trainer: Any) -> Iterator[None]:
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
    current: _MicroBatch
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
                with _within_a_step(case.trainer):
                    _again(case, before)
            return _again(case, case.current)
        except Exception as next_failure:
            if not crossing.is_cross_device(next_failure):
                raise
            latest = next_failure


def _again(case: _Case, batch: _MicroBatch) -> Any:
    _restore(batch.randomness)
    return case.perform(_shallow(batch.inputs))


def _change_map(case: _Case, failure: Exception) -> bool:
    """Put a map in force under which what met in `failure` is together; return whether there is one."""
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
        seen = crossing.crossing_of(failure, model, names, kind, usable[0].index)
        met = _words(seen, kind)
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
        repaired = _repaired_plan(case, request, costed, plan, seen)
    if repaired is None:
        return False
    better, colocated, done = repaired
    try:
        outside.move_along(case.trainer, model, better.device_map)
    except LostModelError:
        raise
    except MoveError as error:
        log.warning(f"{met} met on different devices, but {error}; the map stays")
        return False
    note = f"{met} met on different devices in {'a step' if case.trains else 'an evaluation'}: {done}"
    log.warning(f"{note}, and the step is repeated; nothing is lost")
    case.replanned(replace(better, notes=(*better.notes, note)))
    colocations.remember(model, colocated, cache.folder_of(state.settings().cache))
    return True


def _undo(case: _Case, failure: Exception) -> None:
    """Throw away what the pass that failed has left: gradients, and the activations that its frames hold."""
    crossing.let_go(failure)
    if case.trains:
        case.model.zero_grad(set_to_none=True)


def _repaired_plan(
    case: _Case, request: Request, costed: CostedModel, plan: Plan, seen: crossing.Crossing
) -> tuple[Plan, colocations.Colocations, str] | None:
    """Return the plan of another map, what is to be remembered for it, and what was done, in words; None: no other."""
    model = request.model
    constraints = colocations.of(model).constraints
    if plan.is_librarys:
        return _on_one_device(request, costed, plan, constraints)
    exact = constraints.with_met(seen.blocks) if len(seen.blocks) > 1 else constraints
    exact = exact.with_all(_met_in_dry_run(case, request, costed, plan))
    careful = exact.and_those(of_all_but_layers(costed.blocks))
    parted = compared_heads.parted(plan, costed)
    attempts = [
        (exact, "they are on one device now"),
        (careful, "everything but the layers is on the first device now"),
    ]
    if request.head_device not in (None, request.devices[0].index):
        # The head is compared with that of another model: all else is tried before it leaves that device.
        ahead = exact.and_those(of_all_but_layers(_without_end(costed.structure)))
        attempts.insert(1, (ahead, "everything before the layers is on the first device now"))
    if parted:
        attempts.insert(0, (constraints, "the heads of models of one vocabulary are on one device now"))
    for wanted, done in attempts:
        if wanted == constraints and not parted:
            continue
        try:
            better = planner.solved(
                replace(request, constraints=wanted),
                replace(costed, constraints=costed.constraints.and_those(wanted)),
                plan.recomputed,
            )
        except DoesNotFit:
            continue
        if better is not None and not _same(better, plan, costed):
            return better, colocations.Colocations(wanted), done
    device_map = library_map(model, request.devices)
    if device_map is not None:
        theirs = replace(evaluate("auto", costed, device_map, request.devices), recomputed=plan.recomputed)
        if not _same(theirs, plan, costed):
            remembered = colocations.Colocations(careful, library_map=True)
            return theirs, remembered, "the library's own map is in force now"
    return _on_one_device(request, costed, plan, careful)


def _on_one_device(
    request: Request, costed: CostedModel, plan: Plan, constraints: Constraints
) -> tuple[Plan, colocations.Colocations, str] | None:
    """Return the plan with all of the model on the first device, if it fits there; None if it does not.

    Not remembered: the next training, of a script that may have been mended, tries the other maps again.
    """
    first = request.devices[0].index
    device_map: DeviceMap = {block.name: first for block in costed.blocks}
    alone = replace(evaluate("auto", costed, device_map, request.devices), recomputed=plan.recomputed)
    if alone.shortfall:
        return None
    return alone, colocations.Colocations(constraints), f"all of it is on {request.devices[0].name} now, where it fits"


def _without_end(structure: ModelStructure) -> Sequence[Block]:
    """Return the blocks up to the last layer: without norm and head."""
    return structure.blocks[: len(structure.blocks) - len(structure.end)]


def _met_in_dry_run(
    case: _Case, request: Request, costed: CostedModel, plan: Plan
) -> tuple[frozenset[str | None], ...]:
    """Return what a dry run of the very batch that failed shows to meet, under the map in force."""
    inputs = case.current.inputs
    if not isinstance(inputs, Mapping):
        return ()
    batch = on_host(inputs)
    workload, _ = actual_workload(case.trainer, plan.workload, batch)
    exact = request.with_case(workload=workload, batch=batch)
    places = {block.name: device_of(block.name, plan.device_map) for block in costed.blocks}
    tried = attempt(
        "the dry run of the batch that failed", verification.verify, exact, costed, places, plan.recomputed,
        instead="see the traceback",
    )  # fmt: skip
    return () if tried is None else tuple(tried.met)


def _same(one: Plan, other: Plan, costed: CostedModel) -> bool:
    """Whether two plans have each block on the same device."""
    return all(device_of(each.name, one.device_map) == device_of(each.name, other.device_map) for each in costed.blocks)


def _words(seen: crossing.Crossing, kind: str) -> str:
    names = sorted(name for name in seen.blocks if name is not None)
    if len(seen.blocks) > 1:
        return " and ".join([*names, *(["the inputs"] if None in seen.blocks else [])])
    places = " and ".join(f"{kind}:{index}" for index in sorted(seen.devices))
    return f"tensors of {places}" if places else "tensors"


@contextmanager
def _within_a_step(trainer: TrainerLike) -> Iterator[None]:
    """Have micro-batches know that the one that runs is not the last of its step."""
    held = trainer.accelerator.gradient_state
    before = held.sync_gradients
    held._set_sync_gradients(False)
    try:
        yield
    finally:
        held._set_sync_gradients(before)


def _remembered(inputs: Any) -> _MicroBatch:
    return _MicroBatch(_shallow(inputs), _random_state())


def _shallow(inputs: Any) -> Any:
    """Return the inputs in a container of their own, from which a trainer may take labels out."""
    return inputs.copy() if isinstance(inputs, Mapping) and hasattr(inputs, "copy") else inputs


def _random_state() -> tuple[Any, ...]:
    """Return the states of all generators that a step may draw from: a few kilobytes of host memory."""
    import torch

    module: Any = torch.get_device_module(devices.accelerator_type())
    on_devices = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else None
    return rng.host_states(), on_devices


def _restore(states: tuple[Any, ...]) -> None:
    import torch

    on_host, on_devices = states
    rng.restore(on_host)
    if on_devices is not None:
        torch.get_device_module(devices.accelerator_type()).set_rng_state_all(on_devices)
