"""The three trainings of a class: on the CPU, under the library's map and under ours."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from .classes import Candidate
from .server import Server

MACHINE = "4x256MiB"
ROOMY_MACHINE = "4x4GiB"  # for classes that no configuration makes small enough for the other


def record_of(candidate: Candidate, plain: Server, machine: Server, roomy: Server, seconds: int) -> dict[str, Any]:
    """Return what became of `candidate` in each training, as `table.py` reads it.

    `plain` is a server without devices, `machine` and `roomy` have simulated devices, the latter's being larger;
    `seconds` limits each training.
    """
    start = time.monotonic()
    record: dict[str, Any] = dataclasses.asdict(candidate)
    with tempfile.TemporaryDirectory(prefix="sweep-model-") as folder:
        request = {"candidate": dataclasses.asdict(candidate), "folder": folder}
        record["reference"] = plain.run({**request, "do": "make"}, seconds)
        if "error" not in record["reference"]:
            for server, spec in ((machine, MACHINE), (roomy, ROOMY_MACHINE)):
                record["machine"] = spec
                for mode in ("off", "balanced"):
                    shutil.rmtree(Path(folder, "out"), ignore_errors=True)
                    train_request = {**request, "do": "train", "environment": {"BALANCE_MODE": mode}}
                    record[mode] = server.run(train_request, seconds)
                if not any(_is_short_of_room(record[mode]) for mode in ("off", "balanced")):
                    break
    for name in ("reference", "off", "balanced"):
        if name in record and "error" not in record[name] and name != "balanced":
            record[name].pop("log", None)
    return {**record, "seconds": round(time.monotonic() - start, 1)}


def _is_short_of_room(answer: dict[str, Any]) -> bool:
    """Whether a training has run out of memory, or was placed by no plan because its weights alone do not fit."""
    failed = "OutOfMemoryError" in str(answer.get("error", "")) or "not done in" in str(answer.get("error", ""))
    return failed or "does not fit" in answer.get("log", "") or "blocks that do not fit" in answer.get("log", "")
