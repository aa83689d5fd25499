"""Run a script of many cases on four simulated devices, in one process, and read what it wrote."""

import json
from pathlib import Path
from typing import Any

from tests.end_to_end.run import OFFLINE
from tests.processes import REPOSITORY, SHIM, python

# The script is run as a user's would be that says `import balance_shim` first.
START = "import balance_shim, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"


def results_of(script: "str | Path", model: Path, folder: Path, **more: str) -> dict[str, Any]:
    """Return what `script`, a file of this folder unless its path is absolute, wrote to a file in `folder`.

    `more` are variables of its environment beside, or instead of, the usual ones.
    """
    result = folder / "results.json"
    variables = {**OFFLINE, "BALANCE_SIMULATE": "4x1GiB", "BALANCE_MODE": "off", **more}
    arguments = [str(Path(__file__).parent / script), str(model), str(result)]
    done = python("-c", START, *arguments, paths=(SHIM, REPOSITORY), timeout=600, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(result.read_text())
    return results
