"""The table of a simulated run on standard error: peaks, allocated and reserved, and how busy each device was."""

import sys

from ..report.step_time import describe
from ..report.table import table
from ..timing.step_time import StepTime
from ..units import format_size
from ..virtual.ledger import DeviceUsage


def summary(usage: "tuple[DeviceUsage, ...]", step_time: StepTime | None = None) -> str:
    """Return the figures of each device as text; the last lines tell how even the peaks are, and the step time."""
    rows = [
        [
            device.name,
            format_size(device.capacity),
            format_size(device.peak),
            f"{device.peak / device.capacity:.1%}",
            format_size(device.peak_reserved),
        ]
        for device in usage
    ]
    columns = ["device", "capacity", "peak", "used", "reserved peak"]
    mean = sum(device.peak for device in usage) / len(usage)
    evenness = max(device.peak for device in usage) / mean if mean else 1
    lines = [f"  max/mean of the peaks: {evenness:.2f}"]
    if step_time is not None:
        columns.append("busy")
        rows = [[*row, f"{busy:.0%}"] for row, busy in zip(rows, step_time.busy, strict=True)]
        lines.append(f"  predicted time of a step: {describe(step_time)}")
    return "\n".join([table(columns, rows), *lines])


def write(usage: "tuple[DeviceUsage, ...]", step_time: StepTime | None = None) -> None:
    """Write the table to standard error, if there still is one."""
    try:
        sys.stderr.write(f"balance_shim: memory of the simulated devices\n{summary(usage, step_time)}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass
