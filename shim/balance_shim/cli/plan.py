"""`balance-shim plan`: plan from a config and a list of devices, and compare with the library's own map."""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import log, planning
from ..errors import BalanceError, ModelError, UsageError
from ..language.message import Joined, Message
from ..language.speaker import Say, english, language_of, speaker
from ..memory.cost import TRACED
from ..output import show
from ..plan_options import PRECISIONS, PlanOptions, read_options, reserve_text
from ..units import format_size

if TYPE_CHECKING:
    from ..device import Device
    from ..placement.baseline import Baseline
    from ..placement.candidates import Choice
    from ..placement.costed_model import CostedModel
    from ..placement.plan import Plan
    from ..replicas.shares import Share

FITS, DOES_NOT_FIT, NO_PLAN = 0, 1, 2


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
        notes: what was supposed on the way, a line each.
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
        return chosen is not None and chosen.remedy in ("zero3", "zero3_offload")


def run(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run `balance-shim plan` with these words; return the exit code: 0 it fits, 1 it does not, 2 there is no plan."""
    log.set_level("error")  # what the planner says is about loading; all of it is said here in its own words
    try:
        options, warned = read_options(arguments, environ)
        say = speaker(language_of(environ, options.settings.lang), sys.stdout)
        for line in warned:
            _say(f"warning: {line}")
        with planning.quiet_libraries():
            forecast = forecast_for(options)
        show(json.dumps(to_json(forecast), indent=2) if options.as_json else to_text(forecast, options, say))
        if options.output is not None:
            _write(forecast, options.output)
        if options.picture is not None:
            _draw(forecast, options.picture)
    except BalanceError as error:
        for line in str(error).splitlines():
            _say(line)
        return NO_PLAN
    except Exception:  # 1 would say that the model does not fit
        traceback.print_exc()
        return NO_PLAN
    return FITS if forecast.fits else DOES_NOT_FIT


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
    from ..placement.remedies import saved_by_chunks, what_would_fit
    from ..report.plan_report import chunks_line

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
    usable, workload = request.devices, request.workload
    plan = None
    try:
        costed, recomputed = planner.costed_for(request)
        plan = planner.solved(request, costed, recomputed)
        if plan is None:
            reason = "cannot run with its layers on several devices, as a dry run shows"
            raise ModelError(f"{options.model}: {costed.structure.model_class} {reason}")
    except DoesNotFit:
        costed = planner.cost(request)
    remedies = what_would_fit(plan, request) if plan is not None and plan.shortfall else []
    notes = [subject.resolved.note] if subject.resolved.note else []
    if chosen is not None and chosen.remedy in ("zero3", "zero3_offload"):
        notes.append(Message("ZeRO-3 has no device map; the balanced map is shown for comparison"))
        remedies = []
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
    if workload.guessed:
        notes.append(
            Message("sequence length unknown, assuming {number} tokens; set --seq-len", number=workload.seq_len)
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
        notes=tuple(notes),
        shares=shares,
        choice=choice,
    )


def to_json(forecast: Forecast) -> dict[str, Any]:
    """Return the plan as in the folder of `BALANCE_REPORT`, with the facts that only this command has; bytes."""
    from ..placement.costed_model import lower_bound
    from ..report.forecast import gap

    costed, plan = forecast.costed, forecast.plan
    result: dict[str, Any] = {
        "mode": "balanced",
        "model": {"class": costed.structure.model_class, "parameters": costed.structure.parameters},
        "workload": costed.workload.to_json(),
        "devices": [
            {
                "name": device.name,
                "capacity": device.capacity,
                "predicted_peak": None,
                "predicted_reserved": None,
                "terms": None,
            }
            for device in forecast.devices
        ],
        "device_map": None,
        "lower_bound": lower_bound(costed, forecast.devices),
        "step_time": None,
        "method": costed.method,
        "recomputed": None,
        "notes": [],
    }
    if plan is not None:
        result = plan.to_json()
    result["model"]["dtype"] = forecast.dtype
    choice = forecast.choice
    if choice is not None:
        result["mode"] = "auto"
        result["candidates"] = [candidate.to_json() for candidate in choice.candidates]
        result["chosen"] = None if choice.chosen is None else choice.chosen.remedy
        result["change"] = choice.change or None
        if choice.chosen is not None:
            result["step_time"] = result["candidates"][choice.candidates.index(choice.chosen)]["step_time"]
    result["notes"] = [*result["notes"], *forecast.notes]
    return {
        **result,
        "replicas": len(forecast.shares),
        "shares": [list(share) for share in forecast.shares],
        "fits": forecast.fits,
        "shortfall": _missing(forecast),
        "gap": None if plan is None else gap(plan),
        "remedies": list(forecast.remedies),
        "baseline": forecast.baseline.to_json() if forecast.baseline is not None else None,
        "baseline_failure": forecast.baseline_failure or None,
    }


def to_text(forecast: Forecast, options: PlanOptions, say: Say = english) -> str:
    """Return the tables that the command prints."""
    from ..device import table
    from ..report import forecast as report
    from ..report.candidates import candidates_table, name_of, verdict
    from ..report.plan_report import plan_table, shortfall_line

    costed, plan, baseline = forecast.costed, forecast.plan, forecast.baseline
    machine, structure = table(forecast.devices), costed.structure
    if len(forecast.shares) > 1:
        number = len(forecast.shares)
        machine = Message("{devices}, the weakest of {number} shares", devices=machine, number=number)
    heading = Message(
        "{model}, {billions} B parameters in {dtype}, on {devices} (of which {reserve} is kept free)",
        model=structure.model_class,
        billions=f"{structure.parameters / 1e9:.2f}",
        dtype=forecast.dtype,
        devices=machine,
        reserve=reserve_text(options.settings.reserve),
    )
    notes = (*forecast.notes, *(plan.notes if plan is not None else ()))
    lines = [heading, costed.workload.describe(), *(Message("note: {note}", note=note) for note in notes), ""]
    if forecast.choice is not None:
        table_of_candidates = candidates_table(forecast.choice, say)
        lines += [Message("candidates of mode auto:"), table_of_candidates, verdict(forecast.choice), ""]
    if plan is not None:
        lines += [Message("balanced map, predicted (GiB):"), plan_table(plan, say), report.optimum_line(plan)]
        lines += [*_time(plan, forecast.choice), ""]
    if forecast.compares_map and forecast.choice is not None and forecast.choice.chosen is not None:
        lines.append(Message("{name} fits", name=name_of(forecast.choice.chosen)))
    elif plan is not None:
        lines.append(Message("it fits") if not plan.shortfall else shortfall_line(plan, list(forecast.remedies)))
    else:
        weights = sum(cost.weights for cost in costed.costs)
        missing = _missing(forecast)
        lines.append(
            Message(
                "does not fit: its weights alone are {weights}, {missing} more than {devices}; "
                "use more or larger devices, 4- or 8-bit loading, or a half-precision dtype",
                weights=format_size(weights),
                missing=format_size(missing),
                devices=machine,
            )
            if missing
            else Message(
                "does not fit: blocks are not split, and some fit on none of {devices} together with the others; "
                "use larger devices, 4- or 8-bit loading, or a half-precision dtype",
                devices=machine,
            )
        )
    lines.append("")
    if baseline is None:
        lines.append(Message("transformers' auto fails for this model: {reason}", reason=forecast.baseline_failure))
    else:
        lines += [
            Message(
                "transformers' auto on the same devices, predicted in the same way (GiB): {verdict}",
                verdict=report.verdict_on(baseline),
            ),
            report.comparison(plan, baseline, say),
            *_time(None if baseline.offloads else baseline.plan),
        ]
    return "\n".join(map(say, lines))


def _time(plan: "Plan | None", choice: "Choice | None" = None) -> list[str]:
    """Return a line on the step time of a plan, if it is known; of all replicas if `choice` has several."""
    from ..report.step_time import describe

    time = None if plan is None else plan.step_time
    if choice is not None and choice.chosen is not None and choice.chosen.remedy == "replicas":
        time = choice.chosen.step_time
    return [] if time is None else [Message("predicted step: {time}", time=describe(time))]


def _missing(forecast: Forecast) -> int:
    """Return the bytes that are missing: on the fullest device, or of all devices for the weights alone."""
    if forecast.compares_map:
        return 0
    if forecast.plan is not None:
        return forecast.plan.shortfall
    weights = sum(cost.weights for cost in forecast.costed.costs)
    return max(0, weights - sum(device.available for device in forecast.devices))


def _short(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return next((short for short, full in PRECISIONS.items() if full == name), name)


def _write(forecast: Forecast, path: str) -> None:
    from .. import map_file
    from ..placement.plan import collapse

    if forecast.compares_map:
        _say(f"--output {path}: not written, because ZeRO-3 has no device map")
        return
    if forecast.plan is None:
        _say(f"--output {path}: not written, because there is no map")
        return
    try:
        map_file.write(collapse(forecast.plan.device_map), path)
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written: {error.strerror or error}") from error


def _draw(forecast: Forecast, path: str) -> None:
    from ..report.plan_picture import picture

    if forecast.plan is None:
        _say(f"--picture {path}: not written, because there is no map")
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(picture(to_json(forecast)))
    except OSError as error:
        raise UsageError(f"--picture {path}: cannot be written: {error.strerror or error}") from error


def _say(line: str) -> None:
    print(f"balance-shim plan: {line}", file=sys.stderr)
