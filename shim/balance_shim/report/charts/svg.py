"""Elements of SVG as text, escaped; the colours of all charts; round numbers for axes."""

from collections.abc import Mapping, Sequence
from html import escape

# Told apart by people who do not see all colours alike (Okabe and Ito, 2008).
TERM_COLOURS: Mapping[str, str] = {
    "weights": "#0072b2",
    "gradients": "#d55e00",
    "optimizer": "#009e73",
    "activations": "#e69f00",
    "temporary": "#cc79a7",
    "overhead": "#7f7f7f",
    "allocated": "#0072b2",
    "reserved": "#8cc4e8",
}
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b05a8c", "#b57700", "#2a8fc4", "#7f6000", "#555555")
# On a dark background the darkest of them are lightened.
DARK_LINE_COLOURS = ("#4aa8e0", "#f07f2e", "#2cc79c", "#e29ac4", "#f0b429", "#8accf2", "#c9a94d", "#bbbbbb")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2 1 2")
CHARACTER = 6.6  # width of a digit at font size 12, in pixels, rather too wide than too narrow


def element(tag: str, attributes: Mapping[str, object], *children: str) -> str:
    """Return one element; values of attributes are escaped, `children` are elements or escaped text already."""
    words = "".join(f' {name}="{escape(_text(value))}"' for name, value in attributes.items() if value is not None)
    return f"<{tag}{words}>{''.join(children)}</{tag}>" if children else f"<{tag}{words}/>"


def text(content: str, x: object, y: float, anchor: str = "start", css: str = "") -> str:
    """Return a text whose baseline begins, is centred or ends at (x, y)."""
    classes = f"t {css}".strip()
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": classes}, escape(content))


def percent(fraction: float) -> str:
    """Return a fraction of the width as SVG has it: 0.125 -> "12.5%"."""
    return f"{100 * fraction:.3f}".rstrip("0").rstrip(".") + "%"


def ticks(least: float, most: float, count: int = 8) -> list[float]:
    """Return up to `count` + 1 round numbers from `least` to `most`."""
    power = 10.0 ** (len(str(int((most - least) * 1000))) - 5)  # a little below a tenth of the range
    distance = next(
        factor * power for factor in (1, 2, 5, 10, 20, 50, 100, 200) if (most - least) / (factor * power) <= count
    )
    first = -int(-least // distance)
    return [round(distance * number, 9) for number in range(first, int(most / distance) + 1)]


def style(standalone: bool = True) -> str:
    """Return the rules of all charts; a page has them once, a picture in itself (`standalone`)."""
    terms = "\n".join(f".term-{name}{{fill:{colour}}}" for name, colour in TERM_COLOURS.items())
    lines = "\n".join(f".l{number}{{stroke:{colour}}}" for number, colour in enumerate(LINE_COLOURS))
    dark_lines = "".join(f".l{number}{{stroke:{colour}}}" for number, colour in enumerate(DARK_LINE_COLOURS))
    root = "svg.chart" if standalone else ":root"
    dark = f"{root}{{--ink:#e6e9ed;--faint:#a3adb8;--rule:#3a424c;--paper:#14181d;--bad:#ff8a80}}"
    return f"""
{root}{{--ink:#1b1f24;--faint:#5c6570;--rule:#d5dae0;--paper:#ffffff;--bad:#b3261e}}
.t{{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;fill:var(--ink);
paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}}
.t.faint{{fill:var(--faint)}} .t.bad{{fill:var(--bad);font-weight:600}} .t.strong{{font-weight:600}}
.t.big{{font-size:15px;font-weight:600}}
.paper{{fill:var(--paper)}} .track{{fill:none;stroke:var(--rule)}} .rule{{stroke:var(--rule)}}
.limit{{stroke:var(--ink);stroke-width:2}} .over{{stroke:var(--bad);stroke-width:2;fill:none}}
.segment{{stroke:var(--paper);stroke-width:1}} .busy{{fill:#0072b2}}
.series{{fill:none;stroke-width:2}} .predicted{{fill:none;stroke-dasharray:2 4}}
.mark{{stroke:var(--bad);stroke-dasharray:4 3}} .capacity{{stroke:var(--ink);stroke-dasharray:8 5}}
{terms}
{lines}
@media (prefers-color-scheme:dark){{{dark}{dark_lines}}}
@media print{{{root}{{--ink:#000;--faint:#444;--rule:#bbb;--paper:#fff;--bad:#b3261e}}{lines.replace(chr(10), "")}}}
""".strip()


def picture(width: int, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """Return a picture of its own, for a file: with its style, a background, and text alternatives."""
    frame = {
        "xmlns": "http://www.w3.org/2000/svg", "width": width, "height": _text(height), "class": "chart", "role": "img",
        "viewBox": f"0 0 {width} {_text(height)}",
    }  # fmt: skip
    head = [element("title", {}, escape(title)), element("desc", {}, escape(description))]
    background = element("rect", {"width": "100%", "height": "100%", "class": "paper"})
    return element("svg", frame, *head, element("style", {}, style()), background, *parts) + "\n"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
