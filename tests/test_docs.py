"""The documents: generated pages are current, links lead somewhere, and examples are what the programs take."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from balance_shim import map_file, plan_options
from balance_shim.cli import main
from balance_shim.settings import VARIABLES
from tests import recipes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
INTERNAL = ("BALANCE_SHIM_",)  # variables that the shim sets for its own processes


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_generated_pages_are_current():
    """`python docs/generate.py` would change nothing."""
    for name, generated in runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generated(), f"run docs/generate.py for {name}"


def test_readme_is_short():
    """A newcomer reads all of it, in either language."""
    for name in ("README.md", "README.zh-CN.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 180


def test_links_lead_somewhere(page):
    """Every relative link names a file that exists, and a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_variables_exist(page):
    """Every `BALANCE_*` variable that a page names is one."""
    names = set(re.findall(r"BALANCE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
    unknown = names - {variable.name for variable in VARIABLES}
    assert not {name for name in unknown if not name.startswith(INTERNAL)}


def test_examples_are_valid(page):
    """Maps in JSON can be read, and command lines are ones that `balance-shim` takes."""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language == "json":
            assert map_file.read(text).entries.keys() == json.loads(text).keys()
        for line in recipes.lines_of(text) if language == "sh" else ():
            arguments = [
                argument
                for argument in shlex.split(line, comments=True)
                if "=" not in argument or argument.startswith("-")
            ]
            if arguments[:1] == ["balance-shim"]:
                assert arguments[1] in main.COMMANDS, line
                if arguments[1] == "plan":
                    plan_options.read_options(arguments[2:], {})
