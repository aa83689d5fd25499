"""The end of a monitored training: a table of predicted and measured peaks, and a chart of memory over time."""

from collections.abc import Mapping
from html import escape

from ..report.table import table
from ..units import GIB, format_size
from .history import History

# Told apart by people who do not see all colours alike (Okabe and Ito); repeated with other dashes beyond eight.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#000000")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 440, 76, 210, 40, 52


def predicted_and_measured(history: History, predicted: Mapping[str, int]) -> str:
    """Return a table of each device's predicted and measured peak, their difference, and memory of other processes."""
    measured, others = history.highest("peaks"), history.highest("others")
    rows = []
    for name, peak, used, total in zip(history.names, measured, others, history.totals, strict=True):
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
    """Return an SVG: the peak of each device in each step, its capacity and its predicted peak as dashed lines."""
    measured = history.highest("peaks")
    top = max((*measured, *predicted.values(), *history.totals)) * 1.05
    steps = [point.step for point in history.points]
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(size: float) -> float:
        return HEIGHT - BOTTOM - size / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Peak memory of each device over the steps of a training</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Peak memory of each device, by step</text>',
    ]
    unit, scale = ("GiB", GIB) if top >= GIB else ("MiB", GIB / 1024)
    for value in _ticks(0, top / scale):
        height = y(value * scale)
        parts.append(_line(LEFT, height, WIDTH - RIGHT, height, "#dddddd"))
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(first, last):
        if value.is_integer():
            place = x(value)
            parts.append(_line(place, HEIGHT - BOTTOM, place, HEIGHT - BOTTOM + 5, "black"))
            parts.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:.0f}</text>')
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "black"))
    parts.append(_line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "black"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">optimizer step</text>')
    centre = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="18" y="{centre:.0f}" text-anchor="middle" transform="rotate(-90 18 {centre:.0f})">'
        f"memory ({unit})</text>"
    )
    for total in sorted(set(history.totals)):
        parts.append(_line(LEFT, y(total), WIDTH - RIGHT, y(total), "#555555", "7 4"))
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y(total) - 5:.1f}" text-anchor="end" fill="#555555">'
                     f"capacity {format_size(total)}</text>")  # fmt: skip
    parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{TOP + 4}" fill="#555555">highest peak</text>')
    legend = TOP + 22
    for position, name in enumerate(history.names):
        colour = COLOURS[position % len(COLOURS)]
        points = " ".join(f"{x(point.step):.1f},{y(point.peaks[position]):.1f}" for point in history.points)
        dashes = "" if position < len(COLOURS) else ' stroke-dasharray="1 2"'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        text = f"{name}: {format_size(measured[position])}"
        if name in predicted:
            height = y(predicted[name])
            parts.append(_line(LEFT, height, WIDTH - RIGHT, height, colour, "3 3"))
        parts.append(_line(WIDTH - RIGHT + 14, legend, WIDTH - RIGHT + 38, legend, colour, width=2.5))
        parts.append(f'<text x="{WIDTH - RIGHT + 44}" y="{legend + 4}">{escape(text)}</text>')
        legend += 18
    if predicted:
        parts.append(_line(WIDTH - RIGHT + 14, legend, WIDTH - RIGHT + 38, legend, "#555555", "3 3"))
        parts.append(f'<text x="{WIDTH - RIGHT + 44}" y="{legend + 4}">predicted, same colour</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "", width: float = 1) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def _ticks(least: float, most: float) -> list[float]:
    """Return up to nine round numbers from `least` to `most`."""
    power = 10.0 ** (len(str(int((most - least) * 1000))) - 5)  # a little below a tenth of the range
    distance = next(factor * power for factor in (1, 2, 5, 10, 20, 50, 100) if (most - least) / (factor * power) <= 8)
    first = -int(-least // distance)
    return [round(distance * number, 9) for number in range(first, int(most / distance) + 1)]
