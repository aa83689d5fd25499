"""The sections with charts: memory before and after, predicted and measured, over time, step time, the map."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...units import format_size
from ..charts import bars, curves, svg
from ..charts.bars import Bar
from ..charts.curves import Curve, thinned
from ..folder import RunFolder
from ..memory_record import MemoryRecord
from ..plan_picture import stacked_bars
from ..plan_report import summary as blocks_of
from ..recorded_plan import PlannedDevice, PlanRecord, StepTime
from ..texts import BOUNDS, PAGE, TERMS
from ..what_if import Before, Replanned
from . import findings
from .summary import median_step, seconds


def memory(run: RunFolder, replanned: Replanned) -> dict[str, Any]:
    """Return a chart and a table of memory terms per device for each plan; for the first, transformers' map, too."""
    parts = []
    for position, plan in enumerate(run.plans):
        before = replanned.before if position == 0 and not plan.is_librarys else None
        parts.append(
            {
                "heading": plan.model_class if len(run.plans) > 1 else "",
                "chart": bars.fluid(stacked_bars(plan, before), PAGE["chart_bars"], TERMS),
                "table": _terms(plan, before),
                "notes": _offloads(before),
            }
        )
    reason = "" if replanned.before is not None or not run.plans or run.plans[0].is_librarys else replanned.no_before
    return {
        "parts": parts,
        "legend": [{"css": f"term-{term}", "label": TERMS[term]} for term in _used_terms(run.plans)],
        "no_before": PAGE["no_before"].format(reason=reason) if reason else "",
        "assumed": PAGE["assumed"] if replanned.before is not None and not replanned.exact else "",
        "no_plan": "" if run.plans else PAGE["no_plan"].format(mode=run.run.get("mode") or "?"),
    }


def compared(run: RunFolder) -> dict[str, Any] | None:
    """Return predicted and measured peaks, in tensors and reserved, of each device; None where nothing was measured."""
    planned = {device.name: device for plan in run.plans[:1] for device in plan.devices}
    simulated = {device.name: device for device in run.simulated}
    rows, chart = [], []
    for record in run.records:
        peaks, reserved, of_others = (record.highest(field) for field in ("peak", "reserved", "others"))
        predicted, totals = record.last("predicted"), record.last("total")
        for name in peaks:
            plan = planned.get(name)
            guess = predicted.get(name) or (plan.predicted_peak if plan is not None else None)
            reserved_peak = reserved.get(name) or (simulated[name].reserved_peak if name in simulated else 0)
            label = _label(record, name, run.records)
            total = totals.get(name) or (plan.capacity if plan is not None else 0)
            guess_reserved = plan.predicted_reserved if plan is not None else None
            rows.append(
                [
                    label,
                    format_size(guess) if guess else "",
                    format_size(peaks[name]),
                    f"{(peaks[name] - guess) / guess:+.1%}" if guess else "",
                    format_size(guess_reserved) if guess_reserved else "",
                    format_size(reserved_peak) if reserved_peak else "",
                    format_size(of_others.get(name, 0)),
                    format_size(total) if total else "",
                ]
            )
            if guess:
                chart.append(_pair(PAGE["predicted"], guess, guess_reserved, total, heading=label))
            chart.append(_pair(PAGE["measured"], peaks[name], reserved_peak, total, heading="" if guess else label))
    if not rows:
        return None
    keys = ("device", "predicted_peak", "measured_peak", "difference", "predicted_reserved", "measured_reserved")
    return {
        "chart": bars.fluid(chart, PAGE["chart_bars"], TERMS),
        "legend": [{"css": f"term-{term}", "label": TERMS[term]} for term in ("allocated", "reserved")],
        "header": [PAGE[key] for key in (*keys, "others", "total")],
        "rows": rows,
    }


def over_time(run: RunFolder) -> dict[str, Any] | None:
    """Return the peak of each device over the steps; None where nothing was recorded."""
    lines, limits = [], {}
    for record in run.records:
        predicted = record.last("predicted")
        for name in record.highest("peak"):
            points = [(step.step, float(step.devices[name].peak)) for step in record.steps if name in step.devices]
            lines.append(Curve(_label(record, name, run.records), thinned(points), predicted.get(name)))
        for total in record.last("total").values():
            limits[PAGE["capacity_line"].format(size=format_size(total))] = float(total)
    steps = [step for curve in lines for step, _ in curve.points]
    if not steps:
        return None
    description = PAGE["chart_curves"].format(first=min(steps), last=max(steps))
    marks = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", findings.marks(run), strict=False))
    places = {letter: step for letter, (_, step) in marks.items()}
    return {
        "chart": curves.fluid(lines, description, limits, places, PAGE["step"]),
        "marks": [
            f"{letter}: {heading}, {PAGE['at_step'].format(step=step)}" for letter, (heading, step) in marks.items()
        ],
        "keys": [
            {"line": _key(number), "text": f"{curve.label}: {format_size(curve.highest)}"}
            for number, curve in enumerate(lines)
        ],
    }


def timing(run: RunFolder) -> dict[str, Any] | None:
    """Return the seconds of each step, and the busy share of each device; None where neither is known."""
    shares = _busy(run)
    steps = run.records[0].steps if run.records else ()
    median = median_step(run)
    chart = ""
    if median is not None and len(steps) > 1:
        curve = Curve(PAGE["step_time"], thinned([(step.step, step.seconds) for step in steps]))
        unit = (1.0, "s") if curve.highest >= 1 else (0.001, "ms")
        description = PAGE["chart_time"].format(seconds=seconds(median))
        chart = curves.fluid([curve], description, axis=PAGE["step"], scale=unit)
    if not shares and not chart:
        return None
    predicted = run.plans[0].step_time if run.plans else None
    return {
        "predicted": "" if predicted is None else _predicted(predicted),
        "chart": chart,
        "busy": bars.fluid([bar for _, bar in shares], PAGE["chart_bars"], TERMS) if shares else "",
        "rows": [row for row, _ in shares],
        "simulated": bool(run.run.get("simulated")) and bool(chart),
    }


def maps(run: RunFolder) -> list[dict[str, Any]]:
    """Return the device map of each plan: blocks of each device, and the map as JSON."""
    tables = []
    for plan in run.plans:
        rows = []
        for device in plan.devices:
            _, _, index = device.name.rpartition(":")
            rows.append([device.name, blocks_of(dict(plan.device_map), int(index) if index.isdecimal() else index)])
        heading = plan.model_class if len(run.plans) > 1 else ""
        tables.append({"heading": heading, "rows": rows, "json": json.dumps(plan.device_map, indent=1)})
    return tables


def _terms(plan: PlanRecord, before: Before | None) -> dict[str, Any]:
    terms = list(TERMS)[:6]
    rows = []
    theirs = {device.name: device for device in before.devices} if before is not None else {}
    for device in plan.devices:
        if device.name in theirs:
            rows.append(_row(theirs[device.name], PAGE["before"], terms))
        rows.append(_row(device, PAGE.get(f"after_{plan.mode}", PAGE["after_map"]), terms))
    names = [TERMS[term] for term in terms]
    return {"header": [PAGE["device"], PAGE["map"], *names, PAGE["peak"], PAGE["capacity"], PAGE["used"]], "rows": rows}


def _row(device: PlannedDevice, map_name: str, terms: Sequence[str]) -> list[str]:
    sizes = [device.terms.get(term, 0) for term in terms]
    share = f"{device.predicted_peak / device.capacity:.0%}" if device.capacity else ""
    return [
        device.name, map_name, *map(format_size, sizes), format_size(device.predicted_peak),
        format_size(device.capacity), share,
    ]  # fmt: skip


def _used_terms(plans: Sequence[PlanRecord]) -> list[str]:
    used = {term for plan in plans for device in plan.devices for term, size in device.terms.items() if size}
    return [term for term in svg.TERM_COLOURS if term in used]


def _offloads(before: Before | None) -> list[str]:
    offloaded: Mapping[str, int] = before.offloaded if before is not None else {}
    return [PAGE["offloaded"].format(size=format_size(size), place=place) for place, size in offloaded.items()]


def _pair(label: str, allocated: int, reserved: int | None, total: int, heading: str) -> Bar:
    segments = {"allocated": allocated, "reserved": max(0, (reserved or 0) - allocated)}
    value = format_size(allocated) + (f" / {format_size(reserved)}" if reserved else "")
    return Bar(label, value, {name: size for name, size in segments.items() if size}, total or None, heading)


def _busy(run: RunFolder) -> list[tuple[list[str], Bar]]:
    predicted = run.plans[0].step_time.busy if run.plans and run.plans[0].step_time is not None else {}
    measured = {device.name: device.busy for device in run.simulated if device.busy is not None}
    for record in run.records:
        measured |= record.last("busy")
    entries = []
    for name in dict.fromkeys((*predicted, *measured)):
        source = PAGE["in_simulation"] if run.run.get("simulated") else PAGE["measured"]
        for how, shares in ((PAGE["predicted"], predicted), (source, measured)):
            if name in shares:
                share = f"{shares[name]:.0%}"
                bar = Bar(f"{name}, {how}", share, {"busy": shares[name]}, 1.0)
                entries.append(([name, how, share], bar))
    return entries


def _predicted(step_time: StepTime) -> str:
    parts = [PAGE["step_predicted"].format(seconds=seconds(step_time.seconds))]
    if step_time.tokens_per_second:
        parts.append(f"{step_time.tokens_per_second:,.0f} {PAGE['tokens']}")
    if step_time.bound in BOUNDS:
        parts.append(BOUNDS[step_time.bound])
    return ", ".join(parts) + "."


def _label(record: MemoryRecord, name: str, records: Sequence[MemoryRecord]) -> str:
    return name if len(records) == 1 else f"{PAGE['rank'].format(rank=record.rank)}, {name}"


def _key(number: int) -> str:
    line = svg.element("line", {"x1": 0, "x2": 36, "y1": 6, "y2": 6, **curves.stroke(number)})
    return svg.element("svg", {"width": 36, "height": 12, "aria-hidden": "true"}, line)
