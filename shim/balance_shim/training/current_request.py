"""The request of a training as it is now: its workload, its batches, and the devices with their free memory."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import devices, state
from ..device import Device
from ..memory.colocation import Constraints
from ..memory.training_case import TrainingCase
from ..memory.workload import Workload
from ..patching.guard import attempt
from ..placement import colocations, fused_head, placed_models
from ..placement.compared_heads import device_of_compared_head
from ..placement.plan import Plan
from ..placement.request import Request
from ..upstream.trainer import TrainerLike
from . import precision, weight_copies
from .actual_workload import actual_workload
from .evaluation import evaluation_of
from .held import held_by

if TYPE_CHECKING:
    from torch import nn


def request_now(trainer: TrainerLike, model: "nn.Module", assumed: Plan, usable: tuple[Device, ...]) -> Request:
    """Return the request for `trainer` as it is now."""
    workload, batch = actual_workload(trainer, assumed.workload)
    workload, evaluation_batch = evaluating(trainer, workload)
    return request_for(trainer, model, workload, batch, usable, evaluation_batch)


def request_for(
    trainer: TrainerLike,
    model: "nn.Module",
    workload: Workload,
    batch: Mapping[str, Any] | None,
    usable: tuple[Device, ...],
    evaluation_batch: Mapping[str, Any] | None = None,
) -> Request:
    """Return the request for a model that is about to train, or trains already."""
    case = TrainingCase.of(
        model,
        workload,
        trains=lambda _, parameter: parameter.requires_grad,
        batch=batch,
        evaluation_batch=evaluation_batch,
    )
    return Request.from_settings(
        state.settings(),
        case,
        usable,
        may_halve=precision.could_halve(),
        constraints=_constraints(trainer, case, usable),
        head_device=device_of_compared_head(model, placed_models.compared_models()),
    )


def usable_now(
    trainer: TrainerLike, model: "nn.Module", assumed: Plan, max_memory: Mapping[Any, Any] | None = None
) -> tuple[Device, ...]:
    """Return the devices of a plan with their free memory now, the model's own share and that of its optimizer too.

    Other models may have come since, or gone: what an earlier one left behind in cycles goes first.
    """
    gc.collect()
    own_bytes = held_by(model, getattr(trainer, "optimizer", None))
    places = {before.device.index for before in assumed.devices}
    now = {device.index: device for device in devices.inventory(state.settings(), max_memory, own_bytes, only=places)}
    return tuple(now.get(before.device.index, before.device) for before in assumed.devices)


def evaluating(trainer: TrainerLike, workload: Workload) -> tuple[Workload, Mapping[str, Any] | None]:
    """Return the workload with the evaluation of `trainer`, and the batch of that, if it can be seen."""
    action, instead = "looking at the evaluation", "the plan covers training only"
    evaluation, batch = attempt(action, evaluation_of, trainer, workload, default=(None, None), instead=instead)
    return replace(workload, evaluation=evaluation), batch


def _constraints(trainer: TrainerLike, case: TrainingCase, usable: tuple[Device, ...]) -> Constraints:
    """Return the constraints that steps have shown, and those of prompts and kernels that `trainer` adds to the model.

    Soft prompts are concatenated with the output of the embedding, outside of any module.
    """
    constraints = colocations.of(case.model).constraints
    if usable and weight_copies.has_parts_on(usable[0].index, trainer.model, case.model):
        constraints = constraints.with_met(case.structure.entry | {None})
    return constraints.and_those(fused_head.constraints_for(case.model, case.structure, trainer.args))
