"""Train a tiny model of every class of the installed transformers under the library's device map and under ours.

    .venv/new/bin/python -m benchmarks.sweep --only 'Llama|ctc' --output /tmp/sweep.jsonl
    .venv/new/bin/python -m benchmarks.sweep --table docs/sweep.md

Each class trains two steps with the Trainer: on the CPU for the losses, on four simulated devices with
`BALANCE_MODE=off`, and there with `BALANCE_MODE=balanced`. A sweep that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import table
from .classes import Candidate, candidates
from .server import REPOSITORY, Server

MACHINE = "4x256MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="classes or tasks to train")
    parser.add_argument("--output", type=Path, help="JSON lines; default: in the temporary folder")
    parser.add_argument("--again", default="", metavar="PATTERN", help="outcomes or classes to train again")
    parser.add_argument("--limit", type=int, default=120, metavar="SECONDS", help="time limit of each training")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of all records and end")
    options = parser.parse_args()
    newest = version("transformers")
    output = options.output or Path(tempfile.gettempdir(), f"sweep-{newest}.jsonl")
    records = _read(output)
    if options.table:
        options.table.write_text(_document(_ordered(records)), encoding="utf-8")
        return
    wanted = [each for each in candidates() if re.search(options.only, f"{each.name} {each.task}")]
    done = {
        name
        for name, record in records.items()
        if not (options.again and re.search(options.again, f"{name} {table.outcome(record)}"))
    }
    todo = _in_turns([each for each in wanted if each.name not in done])
    with Server("") as plain, Server(MACHINE) as machine, output.open("a", encoding="utf-8") as file:
        for number, candidate in enumerate(todo, start=1):
            record = _record(candidate, plain, machine, options.limit)
            records[candidate.name] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            _progress(number, len(todo), record)
    chosen = _ordered({each.name: records[each.name] for each in wanted if each.name in records})
    print(table.summary(chosen))
    print(table.failures(chosen, "broken by us", "loss differs", "same failure"))


def _record(candidate: Candidate, plain: Server, machine: Server, seconds: int) -> dict[str, Any]:
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


def _in_turns(todo: list[Candidate]) -> list[Candidate]:
    """Return the classes task by task in turns, so that a sweep that is stopped has seen something of each task."""
    place: dict[str, int] = {}
    turns = []
    for candidate in todo:
        place[candidate.task] = place.get(candidate.task, -1) + 1
        turns.append((place[candidate.task], candidate))
    return [candidate for _, candidate in sorted(turns, key=lambda turn: turn[0])]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each class."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def _ordered(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[each.name] for each in candidates() if each.name in records]


def _progress(number: int, of: int, record: dict[str, Any]) -> None:
    width = 30
    bar = ("#" * (width * number // of)).ljust(width, ".")
    print(
        f"[{bar}] {number}/{of} {record['seconds']:5.1f} s  {record['name']}: {table.outcome(record)}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _document(records: list[dict[str, Any]]) -> str:
    versions = []
    for package in ("transformers", "torch", "accelerate"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"""# Sweep over the model classes of transformers

Generated by `python -m benchmarks.sweep --table FILE`; {", ".join(versions)}.
For each class a tiny random model trains two steps of 2 rows with the `Trainer` (AdamW, float32, dropout off): on the
CPU, which gives the losses to compare with, and with `device_map="auto"` on {MACHINE} simulated devices under the
library's map and under ours. Losses count as equal to {table.TOLERANCE:g}, relative. *Healed*: fails under the library's map,
trains under ours. *Same failure*: fails under both.

{table.summary(records)}

## Classes

°: the class does not declare which modules may not be split. *: the class computes no loss; the user's Trainer does.

{table.table(records)}

## What fails

{table.failures(records, "broken by us", "loss differs", "same failure") or "Nothing."}

## Not trainable here

{table.failures(records, "not trainable here") or "None."}
"""


_ = REPOSITORY
if __name__ == "__main__":
    main()
