"""Checks that need simulated devices, which a process keeps for life: they run in processes of their own.

A file of checks is a script whose functions named `check_...` raise if something is wrong. Its end is
`main(globals())`, which runs them in order and writes what went wrong as JSON; a test file asks for each by name.
"""

from __future__ import annotations

import ast
import gc
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests import processes


def main(names: dict[str, Any]) -> None:
    """Run each check in `names`, and write name -> traceback or None to the file that the command line gives."""
    outcome = {}
    for name, check in list(names.items()):
        if name.startswith("check_"):
            try:
                check()
                outcome[name] = None
            except Exception:
                outcome[name] = traceback.format_exc()
            gc.collect()  # accelerate's hooks make cycles, which would keep devices filled for the next check
    Path(sys.argv[1]).write_text(json.dumps(outcome), encoding="utf-8")


def most_resident() -> int:
    """Return the bytes of host memory that this process has held at most.

    The kernel's own count for children (ru_maxrss) begins with what the parent held when it started them.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def checks_in(script: Path) -> list[str]:
    """Return the names of the checks in `script`, in order, without running it."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


def results_of(script: Path, folder: Path, *arguments: str) -> dict[str, str | None]:
    """Run `script` in a process of its own and return what `main` wrote."""
    result = folder / "result.json"
    done = run_script(script, str(result), *arguments)
    assert result.exists(), f"{script.name} ended with {done.returncode}: {done.stderr[-4000:]}"
    return json.loads(result.read_text(encoding="utf-8"))


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with this Python and return what it left; it can import the package and `tests`."""
    # One thread: on a busy machine the threads of small operations wait for each other more than they compute.
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = processes.environment(processes.SHIM, processes.REPOSITORY, **variables)
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
