"""The Chinese pages and messages have what the English ones have: headings, code, tables, variables, options."""

import re
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest

from balance_shim.language import chinese_variables
from balance_shim.settings import VARIABLES

ROOT = Path(__file__).parent.parent
CHINESE = ROOT / "docs" / "zh-CN"
PAIRS = {"README.md": (ROOT / "README.md", ROOT / "README.zh-CN.md")} | {
    str(page.relative_to(CHINESE)): (ROOT / "docs" / page.relative_to(CHINESE), page) for page in CHINESE.rglob("*.md")
}
NEEDED = ("README.md", "modes/balanced.md", "modes/map.md", "modes/replicas.md", "modes/zero3.md", "variables.md",
          "recipes.md", "monitoring.md", "out-of-memory.md", "glossary.md")  # fmt: skip


class Skeleton(NamedTuple):
    """What a translation must not change."""

    headings: list[str]  # their levels
    code: list[str]
    tables: list[list[int]]  # the columns of each row
    items: int  # of lists
    pictures: list[str]
    variables: set[str]
    options: set[str]


def skeleton(text: str) -> Skeleton:
    code = re.findall(r"^```.*?^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    tables: list[list[int]] = []
    before = False
    for line in prose.splitlines():
        is_row = line.startswith("|")
        if is_row and not before:
            tables.append([])
        if is_row:
            tables[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        before = is_row
    return Skeleton(
        re.findall(r"^(#+) ", prose, re.M),
        code,
        tables,
        len(re.findall(r"^(?:- |\d+\. )", prose, re.M)),
        re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose),
        set(re.findall(r"BALANCE_[A-Z_]*[A-Z]", prose)),
        set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", prose)),
    )


def differences(english: str, chinese: str) -> list[str]:
    """Return the names of the parts in which two pages differ."""
    pairs = zip(Skeleton._fields, skeleton(english), skeleton(chinese), strict=True)
    return [name for name, one, other in pairs if one != other]


def test_pages_that_a_user_needs_are_there():
    """Modes, variables, recipes, monitoring, out-of-memory, and the terms."""
    assert set(NEEDED) <= PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_pages_are_equal_but_for_the_language(name):
    """Headings, code blocks, tables, lists, variables and options are the same; each page links to the other."""
    english, chinese = (page.read_text(encoding="utf-8") for page in PAIRS[name])
    for part, one, other in zip(Skeleton._fields, skeleton(english), skeleton(chinese), strict=True):
        assert one == other, part
    assert "[English](" in chinese


FAULTS = {
    "variables": lambda text: text.replace("## ", "`BALANCE_NEW_ONE`\n\n## ", 1),
    "headings": lambda text: text.replace("## ", "### ", 1),
    "tables": lambda text: re.sub(r"^\| .*\n", "", text, count=1, flags=re.M),
    "code": lambda text: text.replace("balance-shim run", "balance-shim  run", 1),
    "options": lambda text: text.replace("`--json`", "`--jsonl`"),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_change_in_one_language_only_is_found(part):
    """A heading, a row, a command, an option or a variable that only one README has."""
    english, chinese = (page.read_text(encoding="utf-8") for page in PAIRS["README.md"])
    assert part in differences(FAULTS[part](english), chinese)
    assert part in differences(english, FAULTS[part](chinese))


def test_a_variable_added_in_one_language_only_is_found():
    """In the settings, the generated page differs from the Chinese one; in the Chinese table, the tables differ."""
    english = runpy.run_path(str(ROOT / "docs" / "generate.py"))["variables"]()
    chinese = (CHINESE / "variables.md").read_text(encoding="utf-8")
    assert not differences(english, chinese)
    more = "| `BALANCE_NEW_ONE` | 1 or 0 | 0 | something |\n"
    assert differences(english + more, chinese) == ["tables", "variables"]
    assert differences(english, chinese + more) == ["tables", "variables"]


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_a_translated_variable_names_the_same_values(variable):
    """Values, names in code and figures are those of the English text."""
    translated = chinese_variables.VARIABLES[variable.name]
    for english, chinese in zip((variable.allowed, variable.default, variable.meaning), translated, strict=True):
        assert bool(english) == bool(chinese)
        assert set(re.findall(r"`[^`]+`", english)) == set(re.findall(r"`[^`]+`", chinese))
        assert set(re.findall(r"\d\w*", english)) <= set(re.findall(r"\d\w*", chinese)) | {"0", "1"}
    if variable.allowed.startswith("one of "):
        values = variable.allowed.removeprefix("one of ").split(", ")
        assert translated.allowed == "、".join(values) + " 之一"
    assert chinese_variables.VARIABLES.keys() == {setting.name for setting in VARIABLES}
