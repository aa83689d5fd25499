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


def record_of(candidate: Candidate, plain: Server, machine: Server, seconds: int) -> dict[str, Any]:
    """Return what became of `candidate` in each training, as `table.py` reads it.

    `plain` is a server without devices, `machine` one with simulated devices; `seconds` limits each training.
    """
    start = time.monotonic()
    record: dict[str, Any] = dataclasses.asdict(candidate)
    with tempfile.TemporaryDirectory(prefix="sweep-model-") as folder:
        request = {"candidate": dataclasses.asdict(candidate), "folder": folder}
        record["reference"] = plain.run({**request, "do": "make"}, seconds)
        if "error" not in record["reference"]:
            for mode in ("off", "balanced"):
                shutil.rmtree(Path(folder, "out"), ignore_errors=True)
                asked = {**request, "do": "train", "environment": {"BALANCE_MODE": mode}}
                record[mode] = machine.run(asked, seconds)
    for name in ("reference", "off", "balanced"):
        if name in record and "error" not in record[name] and name != "balanced":
            record[name].pop("log", None)
    return {**record, "seconds": round(time.monotonic() - start, 1)}
