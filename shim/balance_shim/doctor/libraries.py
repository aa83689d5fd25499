"""Versions of the libraries that matter, and the seams that were found and patched in them."""

import os
import sys
from importlib import import_module, util

from .. import devices, status
from ..seams import KNOWN_TO_WORK, SEAMS
from ..settings import Settings
from ..versions import numbers, version_text
from ..zero.launching import requirements
from .section import Section

# As they are called on PyPI.
LIBRARIES = ("torch", "transformers", "accelerate", "wrapt", "deepspeed", "trl", "peft", "ms_swift", "llamafactory")
NEEDED = ("torch", "transformers", "accelerate")
# Launchers that act when they are imported under zero3; the others are only patched.
NEVER_EMPTY = ("transformers.modeling_utils", "transformers.training_args", "transformers.trainer")
NOT_IMPORTED = ("swift", "llamafactory")


def versions(settings: Settings) -> Section:
    """Return the versions installed, and the range with which this package has run."""
    rows, problems = [["python", sys.version.split()[0], "3.10 on"]], []
    for name in LIBRARIES:
        version = version_text(name)
        oldest, newest = KNOWN_TO_WORK.get("swift" if name == "ms_swift" else name, ("", ""))
        rows.append([name, version or "-", oldest and f"{oldest} to {newest}"])
        if not version and name in NEEDED:
            problems.append(f"{name} is not installed: pip install {name}")
        if version and oldest and numbers(version) < numbers(oldest):
            problems.append(f"{name} {version} is older than any tested version: pip install '{name}>={oldest}'")
    if not version_text("wrapt"):
        problems.append(
            "wrapt is not installed, so patched functions do not look like the originals: pip install wrapt"
        )
    if settings.uses_deepspeed:
        try:
            requirements.check()
        except RuntimeError as error:
            problems.append(str(error))
    return Section.of_table("Versions", ["library", "installed", "tested"], rows, problems, left=3)


def seams() -> Section:
    """Import the patched libraries, and return which functions exist. Takes seconds; the shim has to be armed."""
    problems = []
    if devices.accelerator_type() is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed complains otherwise
    for module in SEAMS:
        library = module.partition(".")[0]
        if library in NOT_IMPORTED or util.find_spec(library) is None:
            continue
        try:
            import_module(module)
        except Exception as error:
            problems.append(f"{module} cannot be imported ({type(error).__name__}: {error}): reinstall {library}")
    patched = status().seams
    for module in NEVER_EMPTY:
        if module in sys.modules and not any(seam.target.startswith(module) for seam in patched):
            problems.append(f"no function of {module} could be patched, so this version runs without the shim")
    rows = [[seam.target, seam.version] for seam in patched]
    return Section.of_table("Seams patched", ["function", "version"], rows, problems, left=2)
