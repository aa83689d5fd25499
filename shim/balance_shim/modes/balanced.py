"""Mode `balanced`: the map under which the fullest device is as empty as it can be."""

from dataclasses import replace
from typing import Any

from .. import cache, devices, log, state
from ..map_file import DeviceMap
from ..memory.colocation import NO_CONSTRAINTS
from ..patching.guard import attempt
from ..placement import colocations, fused_head, placed_models, planner
from ..placement.model_load import ModelLoad
from ..placement.plan import Plan
from ..placement.remedies import what_would_fit
from ..placement.request import Request
from ..replicas import rank_device, ranks
from ..report import plan_report
from . import placing
from .shared_devices import SharedDevices


class Balanced(SharedDevices):
    """Replaces "auto" and its like by a map that evens out training memory."""

    def device_map_for(self, load: ModelLoad) -> DeviceMap | None:
        """Return the balanced map; None, with a line, where there is nothing to balance or no map to be had."""
        if state.settings().replicas == "auto":
            from . import replica_launch

            action, instead = "finding out how many replicas fit", "one is trained"
            attempt(action, replica_launch.launch_largest, load, instead=instead)
        usable = placing.usable_devices(load)
        share = ranks.own_share()
        if share:
            ranks.announce()
        if len(usable) < 2 and not (share and usable):
            available = f"{len(usable)} device" if usable else "no device"
            log.once("info", f"{available} to use: nothing to balance, the library places the model")
            return None
        colocated = colocations.recall(load.model, cache.folder_of(state.settings().cache))
        if colocated.library_map:
            log.info("an earlier training ran only under the library's own map, which is used again")
            return None
        request = placing.request_for(load, usable)
        fused = attempt(
            "looking for a fused head", fused_head.constraints_for, load.model, request.case.structure,
            placed_models.arguments(), default=NO_CONSTRAINTS, instead="norm and head may be on two devices",
        )  # fmt: skip
        request = replace(request, constraints=colocated.constraints.and_those(fused))
        plan = _balanced(request, load.max_memory)
        if plan is None:
            return None
        plan, device_map = placing.put_in_force(plan, request, load)
        if share:
            rank_device.adopt(usable[0].index)
        if plan.shortfall and not request.workload.guessed:
            log.warning(plan_report.shortfall_line(plan, what_would_fit(plan, request)), "does not fit")
        return device_map


def _balanced(request: Request, max_memory: Any) -> Plan | None:
    """Return the balanced plan, without display cards unless nothing fits without them."""
    larger, left_out = devices.without_display_cards(request.devices, state.settings(), max_memory)
    if not left_out:
        return planner.balanced(request)
    plan = planner.fitting(replace(request, devices=larger))
    if plan is None:
        return planner.balanced(request)
    log.info(
        f"{left_out} not used: less than a tenth of the largest device's memory; a device that BALANCE_MAX_MEMORY "
        "names (INDEX=SIZE) is used anyway"
    )
    return plan
