"""Values over the steps of a training: one line for each device, with lines for what there is and what was predicted.

The lines are in an inner picture that stretches with the width; strokes and text keep their size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ...units import GIB, format_size
from .svg import DASHES, LINE_COLOURS, element, percent, picture, text, ticks

HEIGHT, TOP, BOTTOM = 300, 22, 24  # pixels: of the chart, above its frame, and below it
UNITS = 1000  # of the inner picture, in both directions
MOST_POINTS = 600
TEXT = 16  # pixels: of a text above its line, with that line's distance
CLOSE = 0.08  # of the width: labels that are nearer to each other would meet on a narrow screen


@dataclass(frozen=True)
class Curve:
    """One device over the steps: (step, value) in order, and the value that was predicted, if any."""

    label: str
    points: tuple[tuple[int, float], ...]
    predicted: float | None = None

    @property
    def highest(self) -> float:
        return max((value for _, value in self.points), default=0)


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> tuple[tuple[int, float], ...]:
    """Return at most `most` points: of neighbours that are joined, the last step and the highest value."""
    width = -(-len(points) // most) if points else 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return tuple((group[-1][0], max(value for _, value in group)) for group in groups)


def fluid(
    curves: Sequence[Curve],
    description: str,
    limits: Mapping[str, float] | None = None,
    marks: Mapping[str, int] | None = None,
    axis: str = "step",
    scale: tuple[float, str] | None = None,
) -> str:
    """Return the curves as a picture for a page, as wide as there is room.

    Args:
        curves: one for each device.
        description: the text alternative.
        limits: label -> value of horizontal lines, such as capacities.
        marks: label, such as a letter, -> step of vertical lines.
        axis: what the steps are called.
        scale: the unit's value, and its name; None: bytes.
    """
    parts = shapes(curves, limits or {}, marks or {}, axis, scale)
    frame = {"width": "100%", "height": HEIGHT, "role": "img", "aria-label": description, "class": "chart"}
    return element("svg", frame, *parts)


def standalone(
    curves: Sequence[Curve], title: str, description: str, limits: Mapping[str, float], axis: str, width: int = 860
) -> str:
    """Return the curves as a picture for a file, with a key."""
    inner = {"x": 20, "y": 44, "width": width - 40, "height": HEIGHT}
    parts = [text(title, 20, 30, css="big"), element("svg", inner, *shapes(curves, limits, {}, axis, None))]
    y: float = 44 + HEIGHT
    for number, curve in enumerate(curves):
        y += 20
        parts.append(element("line", {"x1": 20, "x2": 56, "y1": y - 4, "y2": y - 4, **stroke(number)}))
        predicted = "" if curve.predicted is None else f", predicted {format_size(curve.predicted)} (dotted)"
        parts.append(text(f"{curve.label}: {format_size(curve.highest)}{predicted}", 64, y))
    return picture(width, y + 18, title, description, parts)


def stroke(number: int) -> dict[str, object]:
    """Return the attributes of the line of device `number`: colour and dashes, either of which tells it from others."""
    dashes = DASHES[number % len(DASHES)]
    return {"class": f"series l{number % len(LINE_COLOURS)}", "stroke-dasharray": dashes or None}


def shapes(
    curves: Sequence[Curve],
    limits: Mapping[str, float],
    marks: Mapping[str, int],
    axis: str,
    scale: tuple[float, str] | None,
) -> list[str]:
    steps = [step for curve in curves for step, _ in curve.points] or [0]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    values = [*(curve.highest for curve in curves), *(curve.predicted or 0 for curve in curves), *limits.values()]
    most = (max(values) or 1) * 1.06
    unit, name = scale or ((GIB, "GiB") if most >= GIB else (GIB / 1024, "MiB"))
    tall = HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (1 - value / most) * tall

    parts = []
    levels = ticks(0, most / unit, 6)
    parts += [_line(y(level * unit), "rule") for level in levels]
    inner = {
        "x": 0, "y": TOP, "width": "100%", "height": tall, "viewBox": f"0 0 {UNITS} {UNITS}",
        "preserveAspectRatio": "none", "overflow": "visible",
    }  # fmt: skip
    parts.append(element("svg", inner, *(_curve(curve, number, x, most) for number, curve in enumerate(curves))))
    parts += [_line(y(value), "capacity") for value in limits.values()]
    for number, curve in enumerate(curves):
        if curve.predicted is not None:
            parts.append(_line(y(curve.predicted), f"predicted l{number % len(LINE_COLOURS)}"))
    # Above their lines, inside the frame: no margin is lost on a narrow screen.
    # A line of `limits` that would go through such a text has its own, with the figure.
    free = [level for level in levels if not any(0 < y(level * unit) - y(value) < TEXT for value in limits.values())]
    parts += [text(f"{level:g} {name}" if level else "0", 2, y(level * unit) - 3, css="faint") for level in free]
    parts += _steps(first, last, x, axis)
    parts += [text(label, "100%", y(value) - 4, "end") for label, value in limits.items()]
    parts += _marks(marks, lambda step: min(1.0, max(0.0, x(step))))
    return parts


def _curve(curve: Curve, number: int, x: Callable[[float], float], most: float) -> str:
    places = [(x(step) * UNITS, (1 - value / most) * UNITS) for step, value in curve.points]
    if len(places) == 1:  # one step is a short line, for a point would not be seen
        places = [(places[0][0], places[0][1]), (places[0][0] + UNITS / 50, places[0][1])]
    points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    title = element("title", {}, escape(curve.label))
    return element("polyline", {"points": points, "vector-effect": "non-scaling-stroke", **stroke(number)}, title)


def _steps(first: int, last: int, x: Callable[[float], float], axis: str) -> list[str]:
    parts = []
    whole = [tick for tick in ticks(first, last, 5) if float(tick).is_integer()]
    for tick in whole:
        place = x(tick)
        anchor = "start" if place < 0.03 else "end" if place > 0.9 else "middle"
        label = f"{axis} {tick:.0f}" if tick == whole[0] else f"{tick:.0f}"
        parts.append(text(label, percent(place), HEIGHT - 6, anchor, "faint"))
    return parts


def _marks(marks: Mapping[str, int], x: Callable[[float], float]) -> list[str]:
    """Return a vertical line for each mark; the labels of lines that are close to each other are joined."""
    parts = []
    labels: list[tuple[float, str]] = []
    for label, step in sorted(marks.items(), key=lambda mark: mark[1]):
        at = x(step)
        place = percent(at)
        parts.append(element("line", {"x1": place, "x2": place, "y1": TOP, "y2": HEIGHT - BOTTOM, "class": "mark"}))
        if labels and at - labels[-1][0] < CLOSE:
            labels[-1] = (labels[-1][0], f"{labels[-1][1]} {label}")
        else:
            labels.append((at, label))
    for at, label in labels:
        parts.append(text(label, percent(at), TOP - 6, "end" if at > 0.5 else "start", "bad"))
    return parts


def _line(y: float, css: str) -> str:
    return element("line", {"x1": 0, "x2": "100%", "y1": y, "y2": y, "class": css})
