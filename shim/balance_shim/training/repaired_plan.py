"""Another plan for a model that has stopped across devices, the mildest change of the map first.

First the blocks that met are colocated, then all blocks but the layers are put on the first device, then the library's
own map is put in force, and at last, if it fits there, the model is put on one device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..map_file import DeviceMap
from ..memory.blocks import Block
from ..memory.colocation import Constraints, of_all_but_layers
from ..memory.structure import ModelStructure
from ..patching.guard import attempt
from ..placement import colocations, compared_heads, planner, verification
from ..placement.balance import DoesNotFit
from ..placement.costed_model import CostedModel
from ..placement.library_map import library_map
from ..placement.places import device_of
from ..placement.plan import Plan, evaluate
from ..placement.request import Request
from ..upstream.trainer import TrainerLike
from . import crossing
from .actual_workload import actual_workload
from .batch_shapes import on_host


class RepairedPlan(NamedTuple):
    """A plan with another map, the colocations to remember for it, and the change of the map in words."""

    plan: Plan
    colocations: colocations.Colocations
    change: str


def repaired_plan(
    trainer: TrainerLike, inputs: Any, request: Request, costed: CostedModel, plan: Plan, met: crossing.Crossing
) -> RepairedPlan | None:
    """Return another plan; None if there is no other map.

    Args:
        trainer: a `transformers.Trainer` in training.
        inputs: of the micro-batch that stopped.
        request: for the training as it is.
        costed: the costs for `request`.
        plan: the one in force.
        met: the blocks that met.
    """
    model = request.model
    constraints = colocations.of(model).constraints
    if plan.is_librarys:
        return _on_one_device(request, costed, plan, constraints)
    exact = constraints.with_met(met.blocks) if len(met.blocks) > 1 else constraints
    exact = exact.with_all(_met_in_dry_run(trainer, inputs, request, costed, plan))
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
    for candidate, change in attempts:
        if candidate == constraints and not parted:
            continue
        try:
            better = planner.solved(
                replace(request, constraints=candidate),
                replace(costed, constraints=costed.constraints.and_those(candidate)),
                plan.recomputed,
            )
        except DoesNotFit:
            continue
        if better is not None and not _same(better, plan, costed):
            return RepairedPlan(better, colocations.Colocations(candidate), change)
    device_map = library_map(model, request.devices)
    if device_map is not None:
        library_plan = replace(evaluate("auto", costed, device_map, request.devices), recomputed=plan.recomputed)
        if not _same(library_plan, plan, costed):
            remembered = colocations.Colocations(careful, library_map=True)
            return RepairedPlan(library_plan, remembered, "the library's own map is in force now")
    return _on_one_device(request, costed, plan, careful)


def _on_one_device(request: Request, costed: CostedModel, plan: Plan, constraints: Constraints) -> RepairedPlan | None:
    """Return the plan with all of the model on the first device, if it fits there; None if it does not.

    Not remembered: the next training, of a script that may have been mended, tries the other maps again.
    """
    first = request.devices[0].index
    device_map: DeviceMap = {block.name: first for block in costed.blocks}
    alone = replace(evaluate("auto", costed, device_map, request.devices), recomputed=plan.recomputed)
    if alone.shortfall:
        return None
    change = f"all of it is on {request.devices[0].name} now, where it fits"
    return RepairedPlan(alone, colocations.Colocations(constraints), change)


def _without_end(structure: ModelStructure) -> Sequence[Block]:
    """Return the blocks up to the last layer: without norm and head."""
    return structure.blocks[: len(structure.blocks) - len(structure.end)]


def _met_in_dry_run(
    trainer: TrainerLike, inputs: Any, request: Request, costed: CostedModel, plan: Plan
) -> tuple[frozenset[str | None], ...]:
    """Return the blocks that meet in a dry run of the batch that failed, under the map in force."""
    if not isinstance(inputs, Mapping):
        return ()
    batch = on_host(inputs)
    workload, _ = actual_workload(trainer, plan.workload, batch)
    exact = request.with_case(workload=workload, batch=batch)
    places = {block.name: device_of(block.name, plan.device_map) for block in costed.blocks}
    tried = attempt(
        "the dry run of the batch that failed", verification.verify, exact, costed, places, plan.recomputed,
        instead="see the traceback",
    )  # fmt: skip
    return () if tried is None else tuple(tried.met)


def _same(one: Plan, other: Plan, costed: CostedModel) -> bool:
    """Whether two plans have each block on the same device."""
    return all(
        device_of(block.name, one.device_map) == device_of(block.name, other.device_map) for block in costed.blocks
    )
