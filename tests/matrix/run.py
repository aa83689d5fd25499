"""Run cells of the matrix: each training without the shim and with it, the same global batch, the losses compared."""

import json
import math
import os
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.matrix.cells import SCRIPT_OF_EXAMPLES, Cell
from tests.matrix.checkout import Examples
from tests.matrix.environments import ENVIRONMENTS, REPOSITORY

TRAININGS = Path(__file__).parent / "trainings"
INJECTED = os.pathsep.join(str(REPOSITORY / folder) for folder in ("shim", "sitecustomize_example"))
LIMIT = 400  # seconds for one training
ROWS = 4  # of the global batch
DEVICES = {"BALANCE_SIMULATE": "4x1GiB"}
PATIENCE = {"BALANCE_NCCL_TIMEOUT": "120"}
# mode -> processes, variables, and what the shim prints where it acts
MODES: dict[str, tuple[int, dict[str, str], str]] = {
    "balanced": (1, {"BALANCE_MODE": "balanced", **DEVICES}, "balanced map for"),
    "map": (1, {"BALANCE_MODE": "map", **DEVICES}, ""),
    "zero3": (2, {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", **PATIENCE}, "ZeRO-3 over 2 processes"),
    "replicas": (2, {"BALANCE_MODE": "balanced", "BALANCE_REPLICAS": "2", **DEVICES}, "replicas: rank 0 on"),
}  # fmt: skip
# The example scripts load without a device map.
FOR_SCRIPTS = {SCRIPT_OF_EXAMPLES: {"BALANCE_INTERCEPT": "auto,balanced,none"}}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Mark:
    """What came of a cell.

    Attributes:
        mark: "works", "works, with a note", "refused" (by the shim, in one line), "not possible" (fails without the
            shim, too) or "fails".
        note: why, in a line.
    """

    cell: Cell
    mark: str
    note: str = ""

    def record(self) -> dict[str, Any]:
        return {**asdict(self.cell), "mark": self.mark, "note": self.note}


@dataclass(frozen=True)
class Run:
    code: int
    log: str
    folder: Path

    @property
    def outcome(self) -> dict[str, Any]:
        file = self.folder / "losses.json"
        return dict(json.loads(file.read_text())) if self.code == 0 and file.exists() else {}

    @property
    def reason(self) -> str:
        """The line that tells why it failed: the shim's own, else the last error."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("balance_shim: error")]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (own or errors or lines or [f"exit code {self.code}"])[-1][:300]


class Environment:
    """One environment's runs, in a folder of their own. `examples`: transformers' scripts, if there is a checkout."""

    def __init__(self, name: str, folder: Path, examples: Examples | None = None) -> None:
        self.name, self.examples = name, examples
        self.python, self.folder, self.models = ENVIRONMENTS[name].python, folder / name, folder / name / "models"
        self._without: dict[tuple[str, str], Run] = {}
        prepared = self.execute([str(TRAININGS / "prepare.py"), str(self.models)], {})
        if prepared[0]:
            raise RuntimeError(f"{name}: {prepared[1][-2000:]}")

    def execute(self, words: list[str], variables: dict[str, str]) -> tuple[int, str]:
        """Run its Python; return the exit code and all output. All processes end with the time limit."""
        kept = {key: text for key, text in os.environ.items() if not key.startswith(("BALANCE_", "PYTHON"))}
        path = f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}"
        process = subprocess.Popen(
            [str(self.python), *words], env={**kept, **QUIET, "PATH": path, **variables}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = f"{process.communicate()[0]}\nno end within {LIMIT} s"
        return process.returncode, output

    def train(self, cell: Cell, mode: str) -> Run:
        processes, variables, _ = MODES.get(mode, (1, {}, ""))
        folder = self.folder / mode / f"{Path(cell.script).stem}-{cell.training}"
        chosen = {**variables, "ROWS": str(ROWS // processes)}
        if mode != "off":
            chosen |= {"PYTHONPATH": INJECTED, "BALANCE_REPORT": str(folder / "report")}
            chosen |= FOR_SCRIPTS.get(cell.script, {})
        if mode == "map":
            chosen["BALANCE_DEVICE_MAP"] = str(self.folder / "balanced" / folder.name / "report" / "device_map.json")
        if self.examples is not None:
            chosen["EXAMPLES"] = str(self.examples.folder)
        words = [str(TRAININGS / cell.script), cell.training, str(self.models), str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        code, log = self.execute(words, chosen)
        (folder / "log.txt").write_text(log)
        return Run(code, log, folder)

    def without(self, cell: Cell) -> Run:
        key = (cell.script, cell.training)
        if key not in self._without:
            self._without[key] = self.train(cell, "off")
        return self._without[key]

    def mark(self, cell: Cell) -> tuple[Mark, Run | None]:
        """Run one cell; what it saved is looked at later."""
        plain = self.without(cell)
        if not plain.outcome:
            return Mark(cell, "not possible", f"without the shim: {plain.reason}"), None
        run = self.train(cell, cell.mode)
        if not run.outcome:
            refused = run.reason.startswith("balance_shim: error") and " failed with " not in run.reason
            return Mark(cell, "refused" if refused else "fails", run.reason), None
        expected, losses = plain.outcome["losses"], run.outcome["losses"]
        if run.outcome.get("sampled"):
            return Mark(cell, "works, with a note", "it samples: losses not compared"), run
        # transformers 4 rounds what it logs to four decimals.
        same = len(losses) == len(expected) and all(
            math.isclose(one, other, rel_tol=1e-4, abs_tol=1.01e-4) for one, other in zip(losses, expected, strict=True)
        )
        if not same:
            return Mark(cell, "fails", f"losses {losses[:4]} instead of {expected[:4]}"), None
        acts = MODES[cell.mode][2]
        if acts not in run.log:
            return Mark(
                cell, "works, with a note", "nothing for the shim to do: the script loads without a device map"
            ), run
        note = self.other_version(cell)
        return Mark(cell, "works, with a note" if note else "works", note), run

    def other_version(self, cell: Cell) -> str:
        """A note where an example script is not of the environment's own version of transformers."""
        if (
            cell.script != SCRIPT_OF_EXAMPLES
            or self.examples is None
            or self.name.endswith(f"-{self.examples.version}")
        ):
            return ""
        return f"the script of transformers {self.examples.version}"

    def check_saved(self, runs: list[tuple[Mark, Run]]) -> list[Mark]:
        """Return the marks, failed where plain libraries do not load what a run has saved."""
        kept = [(mark, run) for mark, run in runs if run.outcome.get("kind") not in (None, "none")]
        folders = {str(run.folder) for _, run in kept} | {str(self.without(mark.cell).folder) for mark, _ in kept}
        result = self.folder / "loaded.json"
        if kept:
            self.execute([str(TRAININGS / "load.py"), str(self.models), str(result), *sorted(folders)], {})
        loaded = json.loads(result.read_text()) if kept else {}
        marks = []
        for mark, run in runs:
            plain, mine = (loaded.get(str(trained.folder)) for trained in (self.without(mark.cell), run))
            if mine != plain:
                why = mine if isinstance(mine, str) else "other parameters or shapes than without the shim"
                mark = Mark(mark.cell, "fails", f"what it saves: {why}")
            marks.append(mark)
        return marks
