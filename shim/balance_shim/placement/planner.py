"""From a model and the settings to a plan: the stages of placing, one after the other."""

import math
from dataclasses import dataclass, replace

from .. import log
from ..cache import cached
from ..device import Device, table
from ..language.message import Message
from ..map_file import DeviceMap, UserMap
from ..memory.colocation import of_all_but_layers
from ..memory.cost import is_estimate
from ..memory.profile import Profile, profile
from ..memory.workload import sizes_of_chunks
from ..units import format_size
from . import careful, compared_heads, evaluated, map_check, timed_balance, verification
from .balance import DoesNotFit, balance, for_memory
from .costed_model import CostedModel
from .plan import Plan, evaluate
from .recompute import least_recomputation, recomputable
from .request import Request

MOST_TRIALS = 5  # of maps, until one runs as predicted


def cost(request: Request) -> CostedModel:
    """Return the structure of the model of `request` and the cost of each block, evaluations included."""
    if request.workload.evaluation is not None:
        return evaluated.with_evaluation(request, cost(request.in_training()))
    workload = request.workload
    costs = Profile.from_json(cached(request.cache, request.key("profile"), lambda: _profile(request).to_json()))
    return CostedModel(
        structure=request.case.structure,
        costs=costs.costs,
        workload=workload,
        first=costs.first,
        schedule=costs.schedule,
        method=costs.method,
        source=costs.source,
        constraints=costs.constraints.and_those(request.constraints),
        math_attention=costs.math_attention,
        repeats_grouped_keys=costs.repeats_grouped_keys,
        records=costs.records,
        first_record=costs.first_record,
        unreached=costs.unreached,
        work=costs.work,
        head_device=request.head_device,
    ).with_flights(workload.in_flight, workload.shares_inputs)


def _profile(request: Request) -> Profile:
    from ..memory.tracing.machine import tracing_for

    with tracing_for(request.architectures, request.repeats_grouped_keys) as target:
        costs = profile(request.case)
    dtypes = sorted({str(call.dtype).removeprefix("torch.") for call in target.math_attention})
    return replace(costs, math_attention=tuple(dtypes), repeats_grouped_keys=target.repeated)


def balanced(request: Request) -> Plan | None:
    """Return the plan of mode `balanced`; None, with a warning that gives the reason, if there is none.

    That is when not even the weights fit, or when the model fails under every map that was verified out.
    """
    try:
        costed, recomputed = costed_for(request)
        plan = solved(request, costed, recomputed)
    except DoesNotFit as gap:
        _say_does_not_fit(request.case.structure.model_class, gap, request)
        return None
    if plan is None:
        log.warning(
            f"{costed.structure.model_class} cannot run with its layers on several devices, as a dry run shows; "
            "the library's own map applies"
        )
    return plan


def fitting(request: Request) -> Plan | None:
    """Return the balanced plan if all of it fits; None, without a line, if it does not."""
    try:
        plan = solved(request, *costed_for(request))
    except DoesNotFit:
        return None
    return None if plan is None or plan.shortfall else plan


def with_most_in_flight(request: Request) -> Request:
    """Return the request with the most micro-batches of a step in flight that fit."""
    for count in sizes_of_chunks(request.workload.accumulation):
        more = request.with_workload(in_flight=count)
        if fitting(more) is not None:
            return more
    return request


def solved(request: Request, costed: CostedModel, recomputed: frozenset[str] | None) -> Plan | None:
    """Return the best plan that passes its dry run, for the result of `costed_for(request)`; None if there is none.

    Results of a dry run (blocks that have to share a device, peaks off the prediction) go into the next solution.

    Raises:
        DoesNotFit: the weights alone do not fit.
    """
    plan, costed = _settled(request, costed, recomputed)
    if plan is None:
        return None
    if plan.workload.in_flight > 1:
        plan = timed_balance.noted(plan, costed, for_memory(costed, request.devices)[1], request.devices)
    return careful.noted(compared_heads.noted(plan, costed), costed, request.devices)


def _settled(
    request: Request, costed: CostedModel, recomputed: frozenset[str] | None
) -> tuple[Plan | None, CostedModel]:
    """Return the plan as `solved` does, and the costs with all corrections by dry runs."""
    if request.workload != costed.workload:
        request = request.with_case(workload=costed.workload)
    costed = careful.carefully(costed, request.devices)
    best: Plan | None = None
    for remaining in reversed(range(MOST_TRIALS)):
        device_map = balance(costed, request.devices)
        if best is not None and device_map == best.device_map:
            break
        verified = as_verified(request, costed, device_map, recomputed)
        if verified.met:
            log.debug(f"a map that does not run: {costed.structure.model_class} computes across {verified.met}")
            more = costed.constraints.with_all(verified.met)
            if more == costed.constraints or remaining == 1:
                more = more.and_those(of_all_but_layers(costed.blocks))
            costed = replace(costed, constraints=more)
            continue
        if best is None or timed_balance.is_better(verified.plan, best):
            best = verified.plan
        if verified.costed == costed:
            break
        costed = verified.costed
    return best or _on_one_device(costed, request.devices, recomputed), costed


def _on_one_device(costed: CostedModel, devices: tuple[Device, ...], recomputed: frozenset[str] | None) -> Plan | None:
    """Return the plan of the whole model on the first device that holds it; None if none does.

    For a model that fails under every map with several devices, the library's own among them in all likelihood.
    """
    note = "its layers run on one device only, as dry runs show"
    for device in devices:
        device_map: DeviceMap = {block.name: device.index for block in costed.blocks}
        plan = evaluate("balanced", costed, device_map, devices, [note])
        if not plan.shortfall:
            return replace(plan, recomputed=recomputed)
    return None


@dataclass(frozen=True)
class Verified:
    """The plan of a map after its dry run, the costs that agree with it, and the blocks that met across devices."""

    plan: Plan
    costed: CostedModel
    met: tuple[frozenset[str | None], ...]


def as_verified(
    request: Request, costed: CostedModel, device_map: DeviceMap, recomputed: frozenset[str] | None
) -> Verified:
    """Return the plan of `device_map`, corrected by a dry run."""
    verified = verification.verify(request, costed, device_map, recomputed)
    # An estimate implies already that this model fails in a dry run.
    is_news = verified.failure and not is_estimate(costed.source)
    notes: list[str] = []
    if is_news:
        notes.append(Message("the map has had no dry run: {reason}", reason=str(verified.failure)))
    for misprediction in verification.mispredictions(verified, costed, device_map, request.devices):
        notes.append(misprediction.describe())
        if misprediction.seen > misprediction.predicted:
            costed = verification.corrected(verified, costed, device_map, request.devices[0], misprediction)
            notes[-1] = Message("{note}; the figures here include it", note=notes[-1])
    plan = replace(evaluate("balanced", costed, device_map, request.devices, notes), recomputed=recomputed)
    return Verified(plan, costed, verified.met)


def costed_for(request: Request) -> tuple[CostedModel, frozenset[str] | None]:
    """Return the costs to plan with, and the names of the layers to recompute; None: as the workload has it."""
    if not request.selective:
        return cost(request), None
    choice = _least_recomputing(request.in_training())  # which is no remedy for an evaluation
    return evaluated.with_evaluation(request, choice.costed), choice.recomputed


@dataclass(frozen=True)
class _Choice:
    """Layers to recompute, with the costs that trials have shown; no plan: the weights do not fit, or nothing runs."""

    plan: Plan | None
    costed: CostedModel
    recomputed: frozenset[str]

    @property
    def shortfall(self) -> float:
        return math.inf if self.plan is None else self.plan.shortfall


def _least_recomputing(request: Request) -> _Choice:
    """Return the least recomputation that fits according to dry runs; the closest to it where nothing fits."""
    without, everywhere = (request.with_workload(gradient_checkpointing=checkpoints) for checkpoints in (False, True))
    plain = _choice(without, cost(without), frozenset())
    if not plain.shortfall:
        return plain
    most = _choice(everywhere, cost(everywhere), None)
    most = replace(most, recomputed=frozenset(recomputable(plain.costed, most.costed)))
    if most.shortfall:
        return min(most, plain, key=lambda choice: choice.shortfall)
    constraints = plain.costed.constraints.and_those(most.costed.constraints)
    bare, full = (replace(choice.costed, constraints=constraints) for choice in (plain, most))
    try:
        some = _choice(request, *least_recomputation(bare, full, request.devices))
    except DoesNotFit:  # with the constraints of both
        return most
    return most if some.shortfall else some


def _choice(request: Request, costed: CostedModel, recomputed: frozenset[str] | None) -> _Choice:
    try:
        plan, costed = _settled(request, costed, recomputed)
    except DoesNotFit:  # which is logged where it is solved again
        plan = None
    return _Choice(plan, costed, recomputed or frozenset())


def costed_in_training(costed: CostedModel) -> CostedModel:
    """Return `costed` without the costs of evaluations."""
    costs = tuple(cost.in_training() for cost in costed.costs)
    workload = replace(costed.workload, evaluation=None)
    return replace(costed, costs=costs, first=costed.first.in_training(), workload=workload)


def _say_does_not_fit(model_class: str, gap: DoesNotFit, request: Request) -> None:
    log.warning(
        f"{model_class} does not fit {table(request.devices)}: its weights alone are "
        f"{format_size(gap.needed)}, {format_size(gap.needed - gap.available)} too much. The library's own map "
        "applies, which keeps the rest in host memory or on disk, where it cannot be trained. Use more devices, "
        "4- or 8-bit loading, or a half-precision dtype"
        if gap.needed > gap.available
        else f"{model_class} has blocks that do not fit {table(request.devices)} together; the library's own map "
        "applies"
    )


def from_user(request: Request, user_map: UserMap, devices: int) -> Plan:
    """Return the plan of mode `map`: the user's map, completed where that is safe, with its predicted peaks.

    Raises:
        DeviceMapError: the map does not fit the model or the machine.
    """
    device_map, notes = map_check.fit(user_map, request.model, request.case.structure, devices)
    costed = cost(request)
    return evaluate("map", costed, device_map, request.devices, notes)
