"""The table of peaks, allocated and reserved, that a simulated run leaves on standard error."""

import sys

from ..report.table import table
from ..units import format_size
from ..virtual.ledger import DeviceUsage


def summary(usage: "tuple[DeviceUsage, ...]") -> str:
    """Return the peaks per device as text; the last line tells how even they are."""
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
    mean = sum(device.peak for device in usage) / len(usage)
    evenness = max(device.peak for device in usage) / mean if mean else 1
    columns = ["device", "capacity", "peak", "used", "reserved peak"]
    return f"{table(columns, rows)}\n  max/mean of the peaks: {evenness:.2f}"


def write(usage: "tuple[DeviceUsage, ...]") -> None:
    """Write the table to standard error, if there still is one."""
    try:
        sys.stderr.write(f"balance_shim: memory of the simulated devices\n{summary(usage)}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass
