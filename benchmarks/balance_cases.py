"""What balance.py runs: the cases, and the file that their results are kept in."""

from __future__ import annotations

import fnmatch
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import MODELS, REPOSITORY, Model

GIB = 2**30
CACHE = REPOSITORY / ".cache" / "benchmarks"
RESULTS = CACHE / "balance.jsonl"


@dataclass(frozen=True)
class Workload:
    """One way to train: the script's arguments, and what the shim is told of them."""

    title: str
    seq_len: int
    lora: bool
    checkpointing: bool

    @property
    def arguments(self) -> list[str]:
        switches = ["--lora"] * self.lora + ["--checkpointing"] * self.checkpointing
        return ["--seq-len", str(self.seq_len), *switches]

    @property
    def variables(self) -> dict[str, str]:
        return {"BALANCE_SEQ_LEN": str(self.seq_len), "BALANCE_TUNING": "lora" if self.lora else "full"}


@dataclass(frozen=True)
class Machine:
    """Devices of these sizes in GiB, times `factor` so that no run is limited by them."""

    title: str
    sizes: tuple[int, ...]
    factor: int

    @property
    def spec(self) -> str:
        return "+".join(f"1x{size * self.factor}GiB" for size in self.sizes)

    @property
    def is_even(self) -> bool:
        return len(set(self.sizes)) == 1


WORKLOADS = {
    "full": Workload("full", 2048, lora=False, checkpointing=False),
    "full-ckpt": Workload("full, checkpointing", 4096, lora=False, checkpointing=True),
    "lora": Workload("LoRA", 2048, lora=True, checkpointing=False),
    "lora-ckpt": Workload("LoRA, checkpointing", 4096, lora=True, checkpointing=True),
}
MACHINES = {
    "4": Machine("4 equal devices", (64,) * 4, 32),
    "8": Machine("8 equal devices", (64,) * 8, 32),
    "mixed": Machine("24+24+48+48", (24, 24, 48, 48), 64),
}
METHODS = ("auto", "balanced_low_0", "split_model", "shim", "shim-chunked", "shim-untold", "search")

# What is run unless --cases asks for something else. balanced_low_0 and split_model know nothing of unequal devices.
DEFAULT = (
    "*/*/*/auto", "*/*/[48]/balanced_low_0", "*/*/[48]/split_model", "*/*/*/shim", "*/*/*/shim-chunked",
    "*/*/*/search",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: Model
    workload: str
    machine: str
    method: str

    @property
    def key(self) -> str:
        return f"{self.model.name}/{self.workload}/{self.machine}/{self.method}"

    def beside(self, method: str) -> Case:
        return Case(self.model, self.workload, self.machine, method)


def cases(patterns: Iterable[str]) -> list[Case]:
    """Return the cases that one of `patterns` fits; those of a machine together, so that one server at a time works."""
    all_cases = [
        Case(model, workload, machine, method)
        for machine in MACHINES
        for model in MODELS.values()
        for workload in WORKLOADS
        for method in METHODS
    ]
    return [case for case in all_cases if any(fnmatch.fnmatchcase(case.key, pattern) for pattern in patterns)]


class Results:
    """A file of JSON lines, one a case, the last line of a case being the one that counts."""

    def __init__(self, path: Path):
        self._path = path
        self.by_key: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                self.by_key[result["key"]] = result

    def add(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        result = {"key": key, **result, "commit": _commit()}
        self.by_key[key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        return result

    def get(self, case: Case) -> dict[str, Any] | None:
        """Return the result of `case`, if it has one to be counted."""
        result = self.by_key.get(case.key)
        return result if result is not None and result["status"] != "failed" else None


def worst_fill(peaks: Sequence[float], sizes: Sequence[float]) -> float:
    """Return the peak of the fullest device in GiB for each GiB of its nominal size."""
    return max(peak / size for peak, size in zip(peaks, sizes, strict=True)) / GIB


def shown(fill: float, machine: Machine, model: Model) -> str:
    """Return `fill` in GiB on equal devices; on others in percent, on a machine of the size that suits the model."""
    return f"{fill * machine.sizes[0]:.1f}" if machine.is_even else f"{fill / model.machine_scale:.0%}"


def _commit() -> str:
    # Without locks: somebody may be committing in this checkout while the benchmark runs.
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
