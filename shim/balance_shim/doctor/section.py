"""What every part of the examination hands to the command."""

from typing import NamedTuple


class Section(NamedTuple):
    """One part of the report.

    Attributes:
        title: its heading.
        text: what was found, ready to print.
        problems: a line each: what is wrong, and what to do.
    """

    title: str
    text: str
    problems: tuple[str, ...] = ()
