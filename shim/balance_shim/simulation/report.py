"""The table of peaks that a simulated run leaves on standard error."""

import sys

from balance_shim.units import format_size

from .memory import DeviceUsage


def table(usage: "tuple[DeviceUsage, ...]") -> str:
    """Return the peaks per device as text; the last line tells how even they are."""
    lines = [f"{'device':<8}{'capacity':>12}{'peak':>12}{'peak %':>8}"]
    for device in usage:
        percent = 100 * device.peak / device.capacity
        lines.append(f"{device.name:<8}{format_size(device.capacity):>12}{format_size(device.peak):>12}{percent:>8.1f}")
    peaks = [device.peak for device in usage]
    mean = sum(peaks) / len(peaks)
    evenness = f"{max(peaks) / mean:.2f}" if mean else "no device was used"
    lines.append(f"max/mean of the peaks: {evenness}")
    return "\n".join(lines)


def write(usage: "tuple[DeviceUsage, ...]") -> None:
    """Write the table to standard error, if there still is one."""
    try:
        sys.stderr.write(f"balance_shim: memory of the simulated devices\n{table(usage)}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass
