"""`balance-shim plan`: plan from a config and a list of devices, and compare with the library's own map."""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import log, planning
from ..errors import BalanceError, UsageError
from ..language.message import Message
from ..language.speaker import Say, english, language_of, speaker
from ..output import show
from ..plan_options import PlanOptions, read_options, reserve_text
from ..units import format_size
from .forecast import Forecast, forecast_for

if TYPE_CHECKING:
    from ..placement.candidates import Choice
    from ..placement.plan import Plan

FITS, DOES_NOT_FIT, NO_PLAN = 0, 1, 2


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
