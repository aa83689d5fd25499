"""Predict the effect of other settings: those under which the model fits, and savings by chunks and precision."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..language.message import Message
from ..memory.precision import in_dtype, trains_in
from ..memory.recomputation import is_supported
from ..memory.workload import Workload
from ..units import format_size
from .balance import DoesNotFit, balance
from .plan import Plan, evaluate
from .planner import cost, solved
from .request import Request


class Change(NamedTuple):
    """The changes of a remedy: in words, as fields of `Workload`, and whether the weights are loaded in bfloat16."""

    phrase: str
    fields: dict[str, Any]
    halves: bool = False


def what_would_fit(plan: Plan, request: Request) -> list[str]:
    """Return the changes of the workload under which everything fits, the mildest first, each as a phrase.

    Args:
        plan: a balanced plan that does not fit.
        request: the request that it was made for.
    """
    remedies: list[str] = [
        Message(
            "{change} (fullest device {size})", change=remedy.phrase, size=format_size(remedy.plan.worst.predicted_peak)
        )
        for remedy in remedies_that_fit(plan, request)
    ]
    # The request knows the devices of one replica only, so nothing is predicted of more.
    return [*remedies, Message("fewer replicas, each on more devices")] if plan.workload.replicated else remedies


@dataclass(frozen=True)
class Remedy:
    """A change under which everything fits: in words, as fields of `Workload` (none for precision), and its plan."""

    phrase: str
    changes: dict[str, Any]
    plan: Plan


def remedies_that_fit(plan: Plan, request: Request) -> list[Remedy]:
    """Return the changes of the workload under which everything fits, the mildest first; see `what_would_fit`."""
    if not plan.is_estimate:
        return _remedies_that_fit(plan, request)
    from ..memory.tracing import too_long

    # The model does not run on shapes. Each change would try that again, which can take minutes.
    with too_long.estimating():
        return _remedies_that_fit(plan, replace(request, cache=None))


def _remedies_that_fit(plan: Plan, request: Request) -> list[Remedy]:
    remedies = []
    for change in _changes(plan.workload, request):
        changes = change.fields
        other = request.with_case(workload=replace(plan.workload, **changes))
        if change.halves:
            halved = _in_precision(other, "bfloat16", autocast=True)
            if halved is None:
                continue
            other = halved
        if "tuning" in changes:
            other = other.with_case(trains=None)
        if "evaluation" in changes and changes["evaluation"].batch_size == 1:
            other = other.with_case(evaluation_batch=None)
        if changes.keys() & {"batch_size", "seq_len"}:
            other = other.with_case(batch=None)
        candidate = _if_it_fits(other)
        if candidate is not None:
            remedies.append(Remedy(change.phrase, changes, candidate))
    return remedies


def _if_it_fits(request: Request) -> Plan | None:
    """Return the plan if everything fits; dry runs are made only where it seems to."""
    costed = cost(request)
    try:
        if evaluate("balanced", costed, balance(costed, request.devices), request.devices).shortfall:
            return None
        plan = solved(request, costed, None)
    except DoesNotFit:
        return None
    return None if plan is None or plan.shortfall else plan


def saved_by_chunks(plan: Plan, request: Request) -> tuple[str, int]:
    """Return the device whose peak `BALANCE_LOSS=chunked` would lower most under the map of `plan`, and by how much.

    Zero bytes where that would change nothing, or is not the user's choice.
    """
    if not request.may_chunk or plan.recomputed is not None:  # its layers differ, which one trace cannot have
        return "", 0
    costed = cost(request.with_case(workload=replace(plan.workload, loss="chunked")))
    other = evaluate(plan.mode, costed, plan.device_map, request.devices)
    pairs = zip(plan.devices, other.devices, strict=True)
    saved, name = max((full.predicted_peak - chunked.predicted_peak, full.name) for full, chunked in pairs)
    return name, max(0, saved)


def saved_by_precision(plan: Plan, request: Request, dtype: str, autocast: bool) -> dict[str, int]:
    """Return the bytes that a training takes less than one with weights of torch type `dtype`, by term, all devices.

    Args:
        autocast: whether that one would have matrix products in a lower precision.
    """
    terms = ("weights", "gradients", "optimizer", "activations")
    other = _in_precision(request.with_case(workload=plan.workload), dtype, autocast)
    if other is None:
        return dict.fromkeys(terms, 0)
    pairs = list(zip(cost(other).costs, cost(request.with_case(workload=plan.workload)).costs, strict=True))
    return {term: sum(getattr(changed, term) - getattr(current, term) for changed, current in pairs) for term in terms}


def _in_precision(request: Request, dtype: str, autocast: bool) -> Request | None:
    """Return the request for the model in `dtype`; None for a model that cannot be copied."""
    import torch

    from ..memory.tracing.errors import CannotTrace

    try:
        model = in_dtype(request.model, getattr(torch, dtype))
    except CannotTrace:
        return None
    workload = replace(request.workload, autocast=autocast)
    return request.with_case(model=model, parameter_bytes=None, workload=workload)


def _changes(workload: Workload, request: Request) -> list[Change]:
    import torch

    remedies: list[Change] = []
    if request.may_chunk:
        remedies.append(Change("BALANCE_LOSS=chunked", {"loss": "chunked"}))
    evaluation = workload.evaluation
    if evaluation is not None and evaluation.returns != "loss" and evaluation.piles_up:
        shorter = replace(evaluation, accumulated_sequences=evaluation.batch_size)
        remedies.append(Change("eval_accumulation_steps=1", {"evaluation": shorter}))
    if evaluation is not None and evaluation.batch_size > 1:
        smaller = replace(evaluation, batch_size=1, accumulated_sequences=1)
        also = ", eval_accumulation_steps=1" if evaluation.returns != "loss" and evaluation.piles_up else ""
        phrase = f"per_device_eval_batch_size=1{also}"
        remedies.append(Change(phrase, {"evaluation": smaller}))
    checkpoints = is_supported(request.model) and not workload.gradient_checkpointing
    if checkpoints:
        phrase = Message("gradient checkpointing (BALANCE_GRADIENT_CHECKPOINTING=1)")
        remedies.append(Change(phrase, {"gradient_checkpointing": True}))
    if workload.in_flight > 1:
        remedies.append(Change("one micro-batch at a time (BALANCE_PIPELINE=1)", {"in_flight": 1}))
    if workload.batch_size > 1:
        # The rest of the batch is accumulated.
        changes = {"batch_size": 1, "accumulation": workload.accumulation * workload.batch_size}
        remedies.append(Change(Message("a micro-batch of 1 (BALANCE_MICRO_BATCH=1)"), changes))
    if request.may_halve and trains_in(request.model, torch.float32):
        remedies.append(Change("BALANCE_PRECISION=bf16", {}, halves=True))
    if workload.tuning == "full":
        remedies.append(Change(Message("an 8-bit optimizer"), {"optimizer": "adamw_8bit"}))
        remedies.append(Change("LoRA", {"tuning": "lora"}))
        if checkpoints:
            remedies.append(
                Change(Message("LoRA with gradient checkpointing"), {"tuning": "lora", "gradient_checkpointing": True})
            )
    if workload.seq_len >= 512:
        half = workload.seq_len // 2
        remedies.append(Change(Message("sequences of {number} tokens", number=half), {"seq_len": half}))
    return remedies
