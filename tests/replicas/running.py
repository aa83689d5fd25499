"""Run `scripts/trainings.py` on simulated devices, in one process or in ranks that share them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import processes

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        result: the JSON object that its first rank printed.
        peaks: of each simulated device, allocated, in bytes.
        predicted: device index -> predicted peak on the first rank's share, in bytes.
        log: standard error.
        folder: its output folder.
    """

    result: dict[str, Any]
    peaks: list[int]
    predicted: dict[int, int]
    log: str
    folder: Path


def train(name: str, model: Path, folder: Path, ranks: int = 1, micro_batch: int = 2, **variables: str) -> Outcome:
    """Run training `name` with a global micro-batch of `ranks * micro_batch` sequences; it has to succeed."""
    report = folder / "report"
    chosen = {"BALANCE_SIMULATE": "4x1GiB", "BALANCE_REPORT": str(report), "MICRO_BATCH": str(micro_batch), **variables}
    launcher = (*TORCHRUN, str(ranks)) if ranks > 1 else (sys.executable,)
    folder.mkdir(parents=True, exist_ok=True)
    done = start(*launcher, SCRIPTS / "trainings.py", name, model, folder / "output", **chosen)
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    simulated = json.loads((report / "simulation.json").read_text(encoding="utf-8"))
    plan = json.loads((report / "plan.json").read_text(encoding="utf-8"))
    predicted = {int(device["name"].rpartition(":")[2]): device["predicted_peak"] for device in plan["devices"]}
    return Outcome(results, [device["peak"] for device in simulated], predicted, done.stderr, folder / "output")


def start(*command: Any, timeout: float = 240, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command with the shim injected."""
    chosen = {"BALANCE_MODE": "balanced", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    return processes.run(*command, paths=(processes.SHIM, processes.INJECTED), timeout=timeout, **chosen)
