"""Plain text tables."""

import unicodedata
from collections.abc import Sequence


def width_of(text: str) -> int:
    """Return the cells of a terminal that `text` takes: Chinese characters and their punctuation take two."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows under a header in aligned columns: the first `left` to the left, figures to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(width_of(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        aligned = [
            cell + _blank(cell, width) if column < left else _blank(cell, width) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(aligned).rstrip())
    return "\n".join(lines)


def _blank(cell: str, width: int) -> str:
    return " " * (width - width_of(cell))
