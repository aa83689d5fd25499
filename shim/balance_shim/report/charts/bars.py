"""Stacked horizontal bars: the terms of memory of each device, with its capacity; and shares of time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ...units import format_size
from .svg import CHARACTER, element, percent, picture, text

HEIGHT, GAP, LABEL = 18, 12, 18  # pixels: of a bar, under it, and of the line above it
ROOM = 0.985  # of the width for the longest bar, so that its end is not on the edge


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: above it, on the left.
        value: above it, on the right.
        segments: length by name, in the order in which they are stacked; a name is that of a term.
        limit: where a line marks what there is; None for none.
        heading: of the group that begins with this bar; "" within a group.
    """

    label: str
    value: str
    segments: Mapping[str, float]
    limit: float | None = None
    heading: str = ""

    @property
    def length(self) -> float:
        return sum(self.segments.values())

    @property
    def is_over(self) -> bool:
        return self.limit is not None and self.length > self.limit


def memory_bar(label: str, terms: Mapping[str, int], capacity: int, heading: str = "") -> Bar:
    """Return the bar of one device; sizes in bytes."""
    peak = sum(terms.values())
    value = f"{format_size(peak)} / {format_size(capacity)} ({peak / capacity:.0%})"
    return Bar(label, value, {name: size for name, size in terms.items() if size > 0}, capacity, heading)


def shapes(bars: Sequence[Bar], top: float = 0.0, titles: Mapping[str, str] | None = None) -> tuple[list[str], float]:
    """Return the elements of all bars, on one scale, and the height below the last.

    Args:
        bars: in order.
        top: the height above them.
        titles: names of segments as people read them.
    """
    longest = max((max(bar.length, bar.limit or 0) for bar in bars), default=0) or 1
    parts, y = [], top
    for bar in bars:
        if bar.heading:
            y += LABEL + 2
            parts.append(text(bar.heading, 0, y - 4, css="strong"))
        y += LABEL
        parts.append(text(bar.label, 0, y - 5, css="" if bar.heading or not bar.label else "faint"))
        parts.append(text(bar.value, "100%", y - 5, "end", "bad" if bar.is_over else "faint"))
        parts += _bar(bar, y, longest, titles or {})
        y += HEIGHT + GAP
    return parts, y


def fluid(bars: Sequence[Bar], description: str, titles: Mapping[str, str] | None = None) -> str:
    """Return the bars as a picture for a page, as wide as there is room. `description` is its text alternative."""
    parts, height = shapes(bars, 0, titles)
    frame = {"width": "100%", "height": f"{height:g}", "role": "img", "aria-label": description, "class": "chart"}
    return element("svg", frame, *parts)


def standalone(bars: Sequence[Bar], title: str, description: str, legend: Mapping[str, str], width: int = 860) -> str:
    """Return the bars as a picture for a file. `legend`: name of a term -> how people read it."""
    inner, margin = width - 40, 20
    parts = [text(title, 0, 16, css="big")]
    keys, top = _legend(legend, 28, inner)
    bars_below, height = shapes(bars, top + 4, legend)
    inside = {"x": margin, "y": margin, "width": inner, "height": f"{height:g}"}
    content = element("svg", inside, *parts, *keys, *bars_below)
    return picture(width, height + 2 * margin - GAP, title, description, [content])


def _bar(bar: Bar, y: float, longest: float, titles: Mapping[str, str]) -> list[str]:
    parts = []
    start = 0.0
    track = max(bar.limit or 0, bar.length) / longest * ROOM
    parts.append(element("rect", {"x": 0, "y": y, "width": percent(track), "height": HEIGHT, "class": "track"}))
    for name, size in bar.segments.items():
        share = size / longest * ROOM
        place = {"x": percent(start), "y": y, "width": percent(share), "height": HEIGHT}
        css = f"segment {'busy' if name == 'busy' else f'term-{name}'}"
        amount = f"{titles.get(name, name)}: {size:.0%}" if name == "busy" else f"{titles.get(name, name)}: "
        amount += "" if name == "busy" else format_size(size)
        parts.append(element("rect", {**place, "class": css}, element("title", {}, escape(amount))))
        start += share
    if bar.limit is not None:
        at = percent(bar.limit / longest * ROOM)
        parts.append(element("line", {"x1": at, "x2": at, "y1": y, "y2": y + HEIGHT + 4, "class": "limit"}))
    if bar.is_over:
        beyond = {"x": at, "y": y, "width": percent((bar.length - (bar.limit or 0)) / longest * ROOM), "height": HEIGHT}
        parts.append(element("rect", {**beyond, "class": "over"}))
    return parts


def _legend(names: Mapping[str, str], top: float, width: float) -> tuple[list[str], float]:
    """Return a key of the segments, in as many lines as it takes, and the height below it."""
    parts, x, y = [], 0.0, top
    for name, label in names.items():
        needed = 18 + CHARACTER * len(label) + 18
        if x and x + needed > width:
            x, y = 0.0, y + 18
        parts.append(element("rect", {"x": x, "y": y, "width": 12, "height": 12, "class": f"term-{name}"}))
        parts.append(text(label, x + 18, y + 10))
        x += needed
    return parts, y + 18
