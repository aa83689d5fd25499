"""The command itself: sections one after another, then the problems together."""

import argparse
import os
from collections.abc import Callable, Sequence

from .. import install, settings
from . import accelerators, libraries, nccl
from .section import Section


def run(words: Sequence[str]) -> int:
    """Print the report; return 1 if there are problems."""
    argparse.ArgumentParser(
        prog="balance-shim doctor",
        description="Versions, seams, devices, links between them, NCCL and CUDA, what the BALANCE_* variables come "
        "to, and each problem with its remedy. The exit code is 1 if there are problems.",
    ).parse_args(words)
    read, faults = settings.read(os.environ)
    sections = [_variables(read, faults)]
    print(f"{sections[0].title}\n{sections[0].text}\n")
    # Not in mode zero3, which would start this command several times; the same functions are patched in all.
    install(mode="balanced", device_map=None, log_level="error")
    parts: dict[str, Callable[[], Section | None]] = {
        "Versions": lambda: libraries.versions(read),
        "Seams patched": libraries.seams,
        "Devices": accelerators.inventory,
        "Links between devices": accelerators.links,
        "NCCL and CUDA": nccl.examine,
    }
    for title, part in parts.items():
        section = _guarded(title, part)
        if section is not None:
            sections.append(section)
            print(f"{section.title}\n{section.text}\n")
    problems = [problem for section in sections for problem in section.problems]
    print("No problems found." if not problems else "Problems, and what to do")
    for problem in problems:
        print(f"  * {problem}")
    return 1 if problems else 0


def _guarded(title: str, part: Callable[[], Section | None]) -> Section | None:
    """Return a section; one that fails is a problem, and the report goes on."""
    try:
        return part()
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"{title} could not be examined ({words}): please report this with the output above"
        return Section(title, f"  failed: {words}", (problem,))


def _variables(read: settings.Settings, faults: Sequence[settings.Problem]) -> Section:
    """Return what the variables come to: each setting that differs from its default."""
    default = settings.Settings()
    lines = [
        f"  {variable.name}: {getattr(read, variable.field)}"
        for variable in settings.VARIABLES
        if getattr(read, variable.field) != getattr(default, variable.field)
    ]
    text = "\n".join([f"  mode {read.mode}", *(line for line in lines if not line.startswith("  BALANCE_MODE"))])
    return Section("Settings", text, tuple(fault.message for fault in faults))
