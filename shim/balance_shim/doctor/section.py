"""The result of one section of `balance-shim doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..report.table import table


class Section(NamedTuple):
    """One part of the report.

    Attributes:
        title: its heading.
        text: the findings, ready to print.
        problems: a line each: the fault and its remedy.
        columns, rows: the same as a table, where it is one.
    """

    title: str
    text: str
    problems: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of_table(
        cls, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], problems: Sequence[str], left: int = 1
    ) -> Section:
        """Return a section that shows a table; the first `left` columns are words, the others figures."""
        text = table(columns, rows, left=left)
        return cls(title, text, tuple(problems), tuple(columns), tuple(tuple(row) for row in rows))
