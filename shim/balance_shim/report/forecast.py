"""The output of `balance-shim plan`: the plan, its distance from the lower bound, and the library's map."""

from collections.abc import Sequence

from ..language.message import Joined, Message
from ..language.speaker import Say, english
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
    return Message(
        "fullest device: {device} with {most}; lower bound for any map: {least} (this plan is within {gap} of it)",
        device=worst.name,
        most=most,
        least=least,
        gap=f"{gap(plan):.1%}",
    )


def gap(plan: Plan) -> float:
    """Return by which fraction the fullest device is above the lower bound."""
    largest = max(device.capacity for device in plan.devices)
    return max(0.0, plan.worst.filled * largest / plan.lower_bound - 1)


def comparison(plan: Plan | None, baseline: Baseline, say: Say = english) -> str:
    """Return a table of each device's predicted peak under our map and the library's, and what the latter offloads."""
    ours = plan.devices if plan is not None else ()
    theirs = baseline.plan.devices
    largest = max(max(device.predicted_peak, device.capacity) for device in (*ours, *theirs))
    rows = []
    for position, device in enumerate(theirs):
        row = [device.name, say(summary(baseline.plan.device_map, device.device.index))]
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
    lines = [table([say(word) for word in header], rows, left=2)]
    for offload in baseline.offloads:
        line = Message(
            "{place}: auto leaves {size} of weights there ({blocks}), which cannot be trained",
            place=offload.place,
            size=format_size(offload.weights),
            blocks=summary(offload.device_map, offload.place),
        )
        lines.append(f"  {say(line)}")
    return "\n".join(lines)


def verdict_on(baseline: Baseline) -> str:
    """Return whether a training under the library's map would fit, in a few words."""
    if baseline.offloads:
        places = _listed([offload.place for offload in baseline.offloads])
        return Message("not trainable, because part of it stays on {places}", places=places)
    over = [device for device in baseline.plan.devices if device.filled > 1]
    if over:
        return Message("out of memory on {devices}", devices=_listed([device.name for device in over]))
    return Message("fits; fullest device {size}", size=format_size(baseline.plan.worst.predicted_peak))


def _differ(plan: Plan) -> bool:
    return len({device.capacity for device in plan.devices}) > 1


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return Message("{names} and {last}", names=Joined(", ", names[:-1]), last=names[-1])
