"""Running Python in processes of its own, with an environment that holds nothing of ours but what a test puts there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHIM = REPOSITORY / "shim"
INJECTED = REPOSITORY / "sitecustomize_example"


def environment(*paths: Path | str, **variables: str) -> dict[str, str]:
    """Return this process's environment without our variables, with `paths` as its PYTHONPATH, and `variables`."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("BALANCE_", "PYTHON"))}
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}


def python(
    *arguments: str,
    paths: Sequence[Path | str] = (SHIM,),
    executable: str | Path = sys.executable,
    timeout: float = 120,
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` and return what it left."""
    return run(executable, *arguments, paths=paths, timeout=timeout, cwd=cwd, **variables)


def run(
    *command: Any,
    paths: Sequence[Path | str] = (SHIM,),
    timeout: float = 120,
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in command],
        env=environment(*paths, **variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def code(text: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python code, as `python -c`."""
    return python("-c", textwrap.dedent(text), *arguments, **more)


def output_of(text: str, **more: Any) -> str:
    """Run a piece of Python code that must succeed; return its standard output, stripped."""
    done = code(text, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
