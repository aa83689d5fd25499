"""Seam 1's work: from a model that is about to load to the plan in force, whoever made the map."""

import gc
import os
from dataclasses import replace
from typing import Any

from .. import devices, log, state
from ..device import Device
from ..map_file import DeviceMap
from ..memory.training_case import TrainingCase
from ..memory.workload import assume, longest_row
from ..patching.guard import attempt
from ..placement import placed_models
from ..placement.compared_heads import device_of_compared_head
from ..placement.model_load import ModelLoad, calls
from ..placement.plan import Plan, collapse
from ..placement.remedies import saved_by_chunks, saved_by_precision
from ..placement.request import Request
from ..replicas import ranks
from ..report import plan_report, run_record
from ..training import precision


def usable_devices(load: ModelLoad) -> tuple[Device, ...]:
    """Return the devices that the model may use, with the memory that is free by the time that it is in use."""
    if placed_models.placed_models():
        gc.collect()  # hooks make cycles, so a model that nobody uses any more (the fold before) may still be there
    share, leaving = ranks.own_share(), placed_models.bytes_leaving()
    usable = devices.inventory(state.settings(), load.max_memory, only=share, leaving=leaving)
    return usable if share is None else tuple(sorted(usable, key=lambda device: share.index(device.index)))


def request_for(load: ModelLoad, usable: tuple[Device, ...], **more: Any) -> Request:
    """Return the request for a model about to load. `more`: further fields."""
    settings = state.settings()
    replicated = ranks.world_size(os.environ) > 1
    workload = assume(settings, placed_models.arguments(), longest_row(load.model.config), replicated)
    case = TrainingCase.of(load.model, workload, load.no_split, parameter_bytes=load.parameter_bytes)
    return Request.from_settings(
        settings,
        case,
        usable,
        may_halve=precision.could_halve(),
        head_device=device_of_compared_head(load.model, placed_models.compared_models()),
        **more,
    )


def put_in_force(plan: Plan, request: Request, load: ModelLoad) -> tuple[Plan, DeviceMap]:
    """Show and remember the plan; return it with its notes, and the map as the library takes it."""
    instead = "the plan is used anyway"
    for alternative, compared in (("the chunked loss", _chunks_line), ("the script's own precision", _precision_line)):
        line = attempt(f"comparing with {alternative}", compared, plan, request, default="", instead=instead)
        if line:
            plan = replace(plan, notes=(*plan.notes, line))
            if plan.is_users:  # a user's map is shown without its notes
                log.info(line)
    settings, number = state.settings(), placed_models.next_number()
    files = attempt("reporting the plan", plan_report.show, plan, settings.report, None, number, instead=instead)
    if files is not None:
        attempt("recording the model", run_record.add_model, settings.report, files, request, instead=instead)
    placed_models.remember_placed(load.model, placed_models.Placed(plan, files, load.max_memory, number))
    call = calls.innermost()
    if call is not None and not call.mapped:
        placed_models.remember_no_map(load.model)
    return plan, collapse(plan.device_map)


def _chunks_line(plan: Plan, request: Request) -> str:
    return plan_report.chunks_line(saved_by_chunks(plan, request))


def _precision_line(plan: Plan, request: Request) -> str:
    call = calls.innermost()
    scripts = None if call is None else call.dtype
    if scripts is None or request.case.parameter_bytes is not None or plan.recomputed is not None:
        return ""
    dtype = str(scripts).removeprefix("torch.")
    autocast = precision.autocast_of_script(placed_models.arguments())
    return plan_report.precision_line(
        str(state.settings().precision), dtype, saved_by_precision(plan, request, dtype, autocast)
    )
