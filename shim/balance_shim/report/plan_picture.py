"""The picture of a plan: the terms of memory on each device, under transformers' map and under the plan's."""

from collections.abc import Mapping
from typing import Any

from ..units import format_size
from .charts import bars
from .charts.bars import Bar, memory_bar
from .charts.svg import TERM_COLOURS
from .recorded_plan import PlanRecord, plan_of
from .texts import PAGE, TERMS
from .what_if import Before, before_of


def picture(written: Mapping[str, Any]) -> str:
    """Return the SVG of a plan in the form of `balance-shim plan --json`."""
    plan = plan_of(written, 1)
    before = None if written.get("baseline") is None else before_of(written["baseline"])
    drawn = stacked_bars(plan, before)
    workload = plan.workload
    title = PAGE["picture_title"].format(
        model=plan.model_class,
        parameters=f"{plan.parameters / 1e9:.1f} B",
        tuning=workload.get("tuning"),
        batch=workload.get("batch_size"),
        tokens=workload.get("seq_len"),
    )
    used = {term for bar in drawn for term in bar.segments}
    legend = {term: TERMS[term] for term in TERM_COLOURS if term in used}
    peaks = "; ".join(f"{bar.heading} {bar.label} {format_size(bar.length)}".strip() for bar in drawn)
    return bars.standalone(drawn, title, peaks, legend)


def stacked_bars(plan: PlanRecord, before: Before | None) -> list[Bar]:
    """Return the bars of each device: under transformers' map, if known, and under that of the plan."""
    drawn = []
    theirs = {device.name: device for device in before.devices} if before is not None else {}
    after = PAGE.get(f"after_{plan.mode}", PAGE["after_map"])
    for device in plan.devices:
        if device.name in theirs:
            other = theirs[device.name]
            drawn.append(memory_bar(PAGE["before"], other.terms, other.capacity, heading=device.name))
            drawn.append(memory_bar(after, device.terms, device.capacity))
        else:
            drawn.append(memory_bar(f"{device.name}, {after}", device.terms, device.capacity))
    return drawn
