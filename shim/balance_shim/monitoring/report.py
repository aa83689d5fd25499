"""The end of a monitored training: a table of predicted and measured peaks, and a chart of memory over time."""

from collections.abc import Mapping

from ..report.charts import curves
from ..report.charts.curves import Curve, thinned
from ..report.table import table
from ..units import format_size
from .history import History


def predicted_and_measured(history: History, predicted: Mapping[str, int]) -> str:
    """Return a table of each device's predicted and measured peak, their difference, and memory of other processes."""
    measured, of_others = history.highest("peaks"), history.highest("others")
    rows = []
    for name, peak, used, total in zip(history.names, measured, of_others, history.totals, strict=True):
        planned = predicted.get(name)
        rows.append(
            [
                name,
                "" if planned is None else format_size(planned),
                format_size(peak),
                "" if not planned else f"{(peak - planned) / planned:+.1%}",
                format_size(used),
                format_size(total),
            ]
        )
    header = ["device", "predicted peak", "measured", "difference", "used by others", "of"]
    return f"memory of this training:\n{table(header, rows)}"


def picture(history: History, predicted: Mapping[str, int]) -> str:
    """Return an SVG: the peak of each device in each step, with its capacity and its predicted peak."""
    lines = [
        Curve(
            name, thinned([(point.step, float(point.peaks[position])) for point in history.points]), predicted.get(name)
        )
        for position, name in enumerate(history.names)
    ]
    limits = {f"capacity {format_size(total)}": float(total) for total in sorted(set(history.totals))}
    title = "Peak memory of each device, by step"
    first, last = history.points[0].step, history.points[-1].step
    description = f"Line chart over steps {first} to {last}; the key has the highest values."
    return curves.standalone(lines, title, description, limits, "step")
