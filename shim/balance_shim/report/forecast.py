"""The output of `balance-shim plan`: the plan, its distance from the lower bound, and the library's map."""

from collections.abc import Sequence

from ..placement.baseline import Baseline
from ..placement.plan import Plan
from ..units import format_size, gib
from .plan_report import summary
from .table import table


def optimum_line(plan: Plan) -> str:
    """Return the line on the lower bound and the gap to it."""
    worst = plan.worst
    largest = max(plan.devices, key=lambda device: device.capacity)
    # Of devices that differ, the bound is the largest one's; fractions compare.
    least = f"{plan.lower_bound / largest.capacity:.0%}" if _differ(plan) else format_size(plan.lower_bound)
    most = f"{worst.filled:.0%}" if _differ(plan) else format_size(worst.predicted_peak)
    return (
        f"fullest device: {worst.name} with {most}; lower bound for any map: {least} "
        f"(this plan is within {gap(plan):.1%} of it)"
    )


def gap(plan: Plan) -> float:
    """Return by which fraction the fullest device is above the lower bound."""
    largest = max(device.capacity for device in plan.devices)
    return max(0.0, plan.worst.filled * largest / plan.lower_bound - 1)


def comparison(plan: Plan | None, baseline: Baseline) -> str:
    """Return a table of each device's predicted peak under our map and the library's, and what the latter offloads."""
    ours = plan.devices if plan is not None else ()
    theirs = baseline.plan.devices
    largest = max(max(device.predicted_peak, device.capacity) for device in (*ours, *theirs))
    rows = []
    for position, device in enumerate(theirs):
        row = [device.name, summary(baseline.plan.device_map, device.device.index)]
        if plan is not None:
            row += [gib(ours[position].predicted_peak, largest), f"{ours[position].filled:.0%}"]
        row += [gib(device.predicted_peak, largest), f"{device.filled:.0%}", gib(device.capacity, largest)]
        rows.append(row)
    header = [
        "device",
        "placed by auto",
        *(["balanced", "used"] if plan is not None else []),
        "auto",
        "used",
        "capacity",
    ]
    lines = [table(header, rows, left=2)]
    for offload in baseline.offloads:
        lines.append(
            f"  {offload.place}: auto leaves {format_size(offload.weights)} of weights there "
            f"({summary(offload.device_map, offload.place)}), which cannot be trained"
        )
    return "\n".join(lines)


def verdict_on(baseline: Baseline) -> str:
    """Return whether a training under the library's map would fit, in a few words."""
    if baseline.offloads:
        return f"not trainable, because part of it stays on {' and '.join(each.place for each in baseline.offloads)}"
    over = [device for device in baseline.plan.devices if device.filled > 1]
    if over:
        return f"out of memory on {_listed([device.name for device in over])}"
    return f"fits; fullest device {format_size(baseline.plan.worst.predicted_peak)}"


def _differ(plan: Plan) -> bool:
    return len({device.capacity for device in plan.devices}) > 1


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
