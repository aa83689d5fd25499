"""Show a snapshot: as a plain table, or as a renderable of rich that follows the width of the terminal."""

from typing import Any

from ...units import format_size
from ..table import table
from ..texts import TOP
from .follow import LiveDevice, Snapshot

FULL = 0.92  # of a device: from here on it is shown as nearly full
WIDEST_BAR = 60
FIGURES = ("now", "peak", "predicted", "capacity", "busy")
DISPENSABLE = (4, 2, 3)  # figures that a narrow terminal does without, in this order
# Without the bar: device, four sizes of nine characters, busy, and two blanks between columns.
OTHER_COLUMNS = 8 + 4 * 9 + 5 + 6 * 2


def plain(snapshot: Snapshot) -> str:
    """Return the snapshot as text without colour."""
    header = [TOP["device"], *(TOP[name] for name in FIGURES)]
    rows = [[_name(device, snapshot), *_figures(device)] for device in snapshot.devices]
    return "\n".join([headline(snapshot), table(header, rows), *remarks(snapshot)])


def headline(snapshot: Snapshot) -> str:
    seconds = f"{snapshot.seconds:.2f} s" if snapshot.seconds >= 1 else f"{snapshot.seconds * 1000:.0f} ms"
    tokens = f"{snapshot.tokens_per_second:,.0f}"
    return TOP["header"].format(step=snapshot.step, seconds=seconds, tokens=tokens)


def remarks(snapshot: Snapshot) -> list[str]:
    """Return the lines under the table: the latest finding, and a step that failed."""
    lines = []
    if snapshot.finding is not None:
        since, text = snapshot.finding
        lines.append(TOP["finding"].format(step=since, text=text))
    if snapshot.unfinished:
        lines.append(f"{TOP['ended']}: {snapshot.failure}" if snapshot.failure else TOP["ended"])
    return lines


def rich_view(snapshot: Snapshot, width: int, unicode: bool) -> Any:
    """Return the snapshot for rich.

    Args:
        snapshot: to show.
        width: of the terminal, in characters.
        unicode: whether the terminal can show block characters.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = [_name(device, snapshot) for device in snapshot.devices]
    bar = min(WIDEST_BAR, width - OTHER_COLUMNS - max(0, max(map(len, names)) - 8) - 2)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    grid.add_column(TOP["device"], no_wrap=True)
    if bar >= 6:
        grid.add_column(TOP["memory"], no_wrap=True, width=bar)
    figures = [_figures(device) for device in snapshot.devices]
    columns = _columns(figures, width - max(map(len, [*names, TOP["device"]])))
    for column in columns:
        grid.add_column(TOP[FIGURES[column]], justify="right", no_wrap=True)
    for name, device, texts in zip(names, snapshot.devices, figures, strict=True):
        style = "bold red" if device.total and device.peak >= FULL * device.total else ""
        cells = [Text(name, style=style)]
        if bar >= 6:
            cells.append(_bar(device, bar, unicode))
        grid.add_row(*cells, *(Text(texts[column]) for column in columns))
    age = TOP["age"].format(seconds=f"{snapshot.age:.0f} s")
    head = Text(headline(snapshot), style="bold", no_wrap=True, overflow="ellipsis")
    foot = Text(f"{age}; {TOP['quit']}", style="dim", no_wrap=True, overflow="ellipsis")
    return Group(head, grid, *(Text(line, style="yellow") for line in remarks(snapshot)), foot)


def _columns(figures: list[list[str]], room: int) -> list[int]:
    """Return the places in `FIGURES` of those for which a terminal has room, rather than cut all of them."""
    needed = {
        place: 2 + max(len(TOP[name]), *(len(texts[place]) for texts in figures)) for place, name in enumerate(FIGURES)
    }
    for place in DISPENSABLE:
        if sum(needed.values()) > room:
            del needed[place]
    return list(needed)


def _bar(device: LiveDevice, width: int, unicode: bool) -> Any:
    """Return a bar: memory in tensors now, up to the peak, free memory, and a mark at the predicted peak."""
    from rich.text import Text

    total = device.total or max(device.peak, device.predicted or 0, 1)
    now, peak = (min(width, round(size / total * width)) for size in (device.now, device.peak))
    characters = "█▒·|" if unicode else "#=.|"
    cells = [characters[0]] * now + [characters[1]] * max(0, peak - now)
    cells += [characters[2]] * (width - len(cells))
    styles = ["cyan"] * now + ["blue"] * max(0, peak - now)
    styles += ["dim"] * (width - len(styles))
    if device.peak >= FULL * total:
        styles = ["red" if style != "dim" else style for style in styles]
    if device.predicted:
        place = min(width - 1, int(device.predicted / total * width))
        cells[place], styles[place] = characters[3], "bold"
    text = Text(no_wrap=True)
    for cell, style in zip(cells, styles, strict=True):
        text.append(cell, style)
    return text


def _name(device: LiveDevice, snapshot: Snapshot) -> str:
    return device.name if snapshot.ranks == 1 else f"{device.rank}/{device.name}"


def _figures(device: LiveDevice) -> list[str]:
    busy = "-" if device.busy is None else f"{'~' if device.busy_is_predicted else ''}{device.busy:.0%}"
    return [
        format_size(device.now),
        format_size(device.peak),
        format_size(device.predicted) if device.predicted else "-",
        format_size(device.total) if device.total else "-",
        busy,
    ]
