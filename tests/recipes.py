"""The commands and scripts of docs/recipes.md, by the heading that they stand under."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


class Command(NamedTuple):
    """One command line: the variables set in front of it, and its arguments."""

    variables: dict[str, str]
    arguments: list[str]


def blocks(heading: str, language: str) -> list[str]:
    """Return the code blocks in `language` under `heading`, which has to be there."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    (section,) = (section for section in sections if section.startswith(f"{heading}\n"))
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def commands(heading: str) -> list[Command]:
    """Return the command lines under `heading`."""
    return [_read(line) for block in blocks(heading, "sh") for line in lines_of(block)]


def lines_of(block: str) -> list[str]:
    """Return the command lines of a code block; one that goes on after a backslash is one line."""
    return block.replace("\\\n", " ").splitlines()


def _read(line: str) -> Command:
    arguments = shlex.split(line, comments=True)
    variables = {}
    while "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        variables[name] = value
    return Command(variables, arguments)
