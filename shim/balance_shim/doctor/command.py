"""The command itself: sections one after another, then the problems together; or all of it as one JSON object."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import __version__, install, settings
from ..output import show
from . import accelerators, libraries, measuring, nccl
from .section import Section


def run(arguments: Sequence[str]) -> int:
    """Print the report; return 1 if there are problems."""
    parser = argparse.ArgumentParser(
        prog="balance-shim doctor",
        description="Check versions, patches, devices, links between them, NCCL and CUDA, and the BALANCE_* variables; "
        "print a remedy for each problem. The exit code is 1 if there are problems.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for bug reports; no secrets in it")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure matrix products, memory, links and launches, in seconds, and store the rates for plans",
    )
    options = parser.parse_args(arguments)
    as_json = options.json
    sections = []
    for section in _sections(options.measure):
        sections.append(section)
        if not as_json:
            show(f"{section.title}\n{section.text}\n")
    problems = [problem for section in sections for problem in section.problems]
    if as_json:
        show(json.dumps(_report(sections), indent=2))
    else:
        show("Problems, and what to do" if problems else "No problems found.")
        for problem in problems:
            show(f"  * {problem}")
    return 1 if problems else 0


def _sections(measures: bool) -> Iterator[Section]:
    """Examine one thing after another. The shim is armed on the way, because only then is anything patched."""
    read, faults = settings.read(os.environ)
    yield _variables(read, faults)
    # Not in mode zero3, which would start this command several times; the same functions are patched in all.
    install(mode="balanced", device_map=None, log_level="error")
    parts: dict[str, Callable[[], Section | None]] = {
        "Versions": lambda: libraries.versions(read),
        "Seams patched": libraries.seams,
        "Devices": accelerators.inventory,
        "Links between devices": accelerators.links,
        "NCCL and CUDA": nccl.examine,
    }
    if measures:
        parts["Measured rates"] = lambda: measuring.measure(read)
    for title, part in parts.items():
        section = _guarded(title, part)
        if section is not None:
            yield section


def _report(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the text for a bug report; the home folder, which has the user's name, is written as "~"."""
    home = os.path.expanduser("~")

    def public(text: str) -> str:
        return text.replace(home, "~") if len(home) > 1 else text

    return {
        "balance_shim": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "sections": {
            section.title: [
                {column: public(cell) for column, cell in zip(section.columns, row, strict=True)}
                for row in section.rows
            ]
            or public(section.text).strip().splitlines()
            for section in sections
        },
        "problems": [public(problem) for section in sections for problem in section.problems],
    }


def _guarded(title: str, part: Callable[[], Section | None]) -> Section | None:
    """Return a section; one that fails becomes a problem, and the report continues."""
    try:
        return part()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"{title} could not be examined ({message}): please report this with the output above"
        return Section(title, f"  failed: {message}", (problem,))


def _variables(read: settings.Settings, faults: Sequence[settings.SettingProblem]) -> Section:
    """Return the settings that result from the variables: each that differs from its default."""
    default = settings.Settings()
    lines = [
        f"  {variable.name}: {getattr(read, variable.field)}"
        for variable in settings.VARIABLES
        if getattr(read, variable.field) != getattr(default, variable.field)
    ]
    text = "\n".join([f"  mode {read.mode}", *(line for line in lines if not line.startswith("  BALANCE_MODE"))])
    return Section("Settings", text, tuple(fault.message for fault in faults))
