"""Run a user's script in a process of its own, the way a user would, and read what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SCRIPTS = HERE / "scripts"

# A simulated accelerator refuses to share a process with a real one, and on one the losses would be the GPU's.
HIDDEN_ACCELERATORS = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
SHIM = ("-m", "balance_shim", "run")

# Nothing is fetched, and what the libraries keep stays in this checkout.
OFFLINE = {
    "HF_HOME": str(REPOSITORY / ".cache" / "huggingface"),
    "MODELSCOPE_CACHE": str(REPOSITORY / ".cache" / "modelscope"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # Addition in a fixed order, so that the same seed gives the same losses in two processes.
    "MKL_CBWR": "COMPATIBLE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a finished process left.

    Attributes:
        losses: one for each logged step; empty if it wrote none.
        peaks: bytes that each simulated device held at most, in the order of the devices; empty if there were none.
    """

    exit_code: int
    stdout: str
    stderr: str
    losses: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def expect_success(self) -> Outcome:
        """Return itself, or raise AssertionError with the end of the process's output."""
        assert self.exit_code == 0, f"exit code {self.exit_code}\n{self.tail()}"
        return self

    def tail(self, characters: int = 6000) -> str:
        return f"--- stdout\n{self.stdout[-characters:]}\n--- stderr\n{self.stderr[-characters:]}"


def run_script(
    script: str | Path,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (),
    timeout: float = 600,
) -> Outcome:
    """Run a script of `scripts/` (by name) or of anywhere (by path); what it writes goes to `folder`.

    `launcher` stands between Python and the script, such as `SHIM`; without it the script has nothing of ours.
    """
    path = SCRIPTS / script if isinstance(script, str) else script
    folder.mkdir(exist_ok=True)
    losses = folder / "losses.jsonl"
    outputs = ["--output", str(folder / "output"), "--losses", str(losses)]
    command = [sys.executable, *launcher, str(path), *arguments, *outputs]
    outcome = run_command(command, {"BALANCE_REPORT": str(folder / "report"), **(environment or {})}, timeout)
    return replace(outcome, losses=read_losses(losses), peaks=read_peaks(folder / "report"))


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
    cwd: Path | None = None,
) -> Outcome:
    """Run `command` with `environment` over a clean, offline one without accelerators; no losses or peaks are read.

    Raises:
        TimeoutError: it took longer than `timeout` seconds; it and its children have been ended.
    """
    process = subprocess.Popen(
        command,
        env=child_environment({**HIDDEN_ACCELERATORS, **(environment or {})}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # ms-swift starts a child of its own, which a time-out must reach too
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise TimeoutError(f"{' '.join(command)} took over {timeout} s\n{stderr[-4000:]}") from None
    return Outcome(process.returncode, stdout, stderr, [])


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without its `BALANCE_*` ones, plus `OFFLINE`, the package's folder, `environment`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCE_")}
    return {**inherited, **OFFLINE, "PYTHONPATH": str(REPOSITORY / "shim"), **(environment or {})}


def on_python_path() -> dict[str, str]:
    """The variable that arms the shim at interpreter start, as a user sets it."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY / "shim", REPOSITORY / "sitecustomize_example")))}


def read_losses(path: Path) -> list[float]:
    """The value of `loss` of each logged step in a JSON-lines file; empty if the file was never written."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [float(record["loss"]) for record in records if "loss" in record]


def read_peaks(report: Path) -> list[int]:
    """The peak of each simulated device, from what the simulation left in the folder `report`; empty if nothing."""
    record = report / "simulation.json"
    return [device["peak"] for device in json.loads(record.read_text(encoding="utf-8"))] if record.exists() else []
