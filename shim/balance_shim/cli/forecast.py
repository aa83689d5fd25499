"""Everything that `balance-shim plan` prints, from a model and a list of devices."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import planning
from ..errors import ModelError
from ..language.message import Joined, Message
from ..memory.cost import TRACED
from ..plan_options import PRECISIONS, PlanOptions
from ..planning import Subject

if TYPE_CHECKING:
    from ..device import Device
    from ..placement.baseline import Baseline
    from ..placement.candidates import Choice
    from ..placement.costed_model import CostedModel
    from ..placement.plan import Plan
    from ..placement.request import Request
    from ..replicas.shares import Share


@dataclass(frozen=True)
class Forecast:
    """Everything that the command prints.

    Attributes:
        costed: the model with what it takes in training.
        dtype: what weights are loaded in, by its short name.
        devices: what was planned for.
        plan: None when not even the weights fit.
        baseline: the library's own map; None when it makes none.
        baseline_failure: why it does not.
        remedies: what would fit, where the plan does not.
        notes: what was assumed on the way, a line each.
        shares: the devices of each replica; the plan is for the share with the least memory.
        choice: what mode `auto` chose; the plan is for that, where it is a map. None: it was not asked.
    """

    costed: "CostedModel"
    dtype: str
    devices: "tuple[Device, ...]"
    plan: "Plan | None"
    baseline: "Baseline | None"
    baseline_failure: str
    remedies: tuple[str, ...]
    notes: tuple[str, ...]
    shares: "tuple[Share, ...]"
    choice: "Choice | None" = None

    @property
    def fits(self) -> bool:
        if self.choice is not None:
            return self.choice.chosen is not None
        return self.plan is not None and not self.plan.shortfall

    @property
    def compares_map(self) -> bool:
        """Whether the plan is only there for comparison: ZeRO-3, which was chosen, has no map."""
        chosen = None if self.choice is None else self.choice.chosen
        return chosen is not None and chosen.is_zero3


def forecast_for(options: PlanOptions) -> Forecast:
    """Return the plan that `options` ask for, and everything printed with it.

    Raises:
        BalanceError: the model cannot be built.
    """
    subject = planning.subject_of(options.model, options)

    from ..placement import planner
    from ..placement.alternatives import choice_for
    from ..placement.balance import DoesNotFit
    from ..placement.baseline import judge
    from ..placement.remedies import what_would_fit

    request = planning.request_for(subject, options)
    choice = chosen = None
    replicas = options.replicas
    if options.chooses_remedy:
        choice = choice_for(request, planning.limits_of(subject, options))
        chosen = choice.chosen
    if chosen is not None and chosen.request is not None:
        request = chosen.request
        replicas = chosen.count if chosen.remedy == "replicas" else 1
    request, shares = planning.replica_of(request, replicas)
    ready = subject.ready
    if len(shares) > 1:  # its map of all devices says nothing of a share
        refusal = Message("accelerate refuses device maps in several processes")
        ready = replace(ready, auto_map=None, auto_failure=refusal)
    usable = request.devices
    plan = None
    try:
        costed, recomputed = planner.costed_for(request)
        plan = planner.solved(request, costed, recomputed)
        if plan is None:
            reason = "cannot run with its layers on several devices, as a dry run shows"
            raise ModelError(f"{options.model}: {costed.structure.model_class} {reason}")
    except DoesNotFit:
        costed = planner.cost(request)
    is_comparison = chosen is not None and chosen.is_zero3
    remedies = [] if plan is None or not plan.shortfall or is_comparison else what_would_fit(plan, request)
    # Without the shim nobody cuts up the loss or repeats keys and values.
    alone = replace(costed.workload, loss="full")
    is_alike = costed.workload == alone and not costed.repeats_grouped_keys
    unchanged = replace(request.with_case(workload=alone), repeats_grouped_keys=False)
    without = costed if is_alike else planner.cost(unchanged)
    return Forecast(
        costed=costed,
        dtype=_short(subject.dtype),
        devices=usable,
        plan=plan,
        baseline=judge(without, ready.auto_map, usable) if ready.auto_map is not None else None,
        baseline_failure=ready.auto_failure,
        remedies=tuple(remedies),
        notes=tuple(_notes(subject, options, request, costed, plan, shares, is_comparison)),
        shares=shares,
        choice=choice,
    )


def _notes(
    subject: Subject,
    options: PlanOptions,
    request: "Request",
    costed: "CostedModel",
    plan: "Plan | None",
    shares: "tuple[Share, ...]",
    is_comparison: bool,
) -> list[str]:
    """Return what was assumed or decided on the way, a line each."""
    from ..placement.remedies import saved_by_chunks
    from ..report.plan_report import chunks_line

    notes: list[str] = [subject.resolved.note] if subject.resolved.note else []
    if is_comparison:
        notes.append(Message("ZeRO-3 has no device map; the balanced map is shown for comparison"))
    if len(shares) > 1:
        assignments = [
            Message("rank {rank} on {devices}", rank=rank, devices=f"cuda:{'+'.join(map(str, share))}")
            for rank, share in enumerate(shares)
        ]
        notes.append(
            Message(
                "{number} replicas: {shares}; the map is that of the share with the least memory",
                number=len(shares),
                shares=Joined(", ", assignments),
            )
        )
    elif options.replicas == "auto":
        notes.append(Message("1 replica: a second one does not fit"))
    if subject.named_dtype is None:
        notes.append(Message("the config names no dtype, assuming bf16; set --precision"))
    if request.workload.guessed:
        notes.append(
            Message("sequence length unknown, assuming {number} tokens; set --seq-len", number=request.workload.seq_len)
        )
    if costed.method != TRACED:
        notes.append(Message("memory of the blocks: {method}", method=costed.method))
    if plan is not None and plan.recomputed is not None:
        enough = Message("as many as possible") if plan.shortfall else Message("as few as fit")
        number = len(plan.recomputed)
        notes.append(
            Message("{number} layers are recomputed in the backward pass, {enough}", number=number, enough=enough)
        )
    if plan is not None:
        line = chunks_line(saved_by_chunks(plan, request))
        notes += [line] if line else []
    return notes


def _short(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return next((short for short, full in PRECISIONS.items() if full == name), name)
