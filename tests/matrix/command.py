"""`python tests/versions.py`: run cells of the matrix and record their marks."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.matrix import table
from tests.matrix.cells import GROUPS, SCRIPT_OF_EXAMPLES, Cell, cells
from tests.matrix.checkout import examples
from tests.matrix.environments import ENVIRONMENTS, REPOSITORY
from tests.matrix.run import MODES, Environment, Mark, Run

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "ms-swift", "llamafactory",
            "sentence-transformers", "setfit", "bitsandbytes", "torchao")  # fmt: skip
# Without one, cells of example scripts are left out.
CHECKOUT = Path(os.environ["MATRIX_TRANSFORMERS_CHECKOUT"]) if "MATRIX_TRANSFORMERS_CHECKOUT" in os.environ else None


def parsed(words: Sequence[str]) -> argparse.Namespace:
    trainings = sorted({name for group in GROUPS for name in (*group.names, group.library)})
    parser = argparse.ArgumentParser(prog="python tests/versions.py", description=__doc__)
    parser.add_argument("--environment", action="append", default=[], choices=list(ENVIRONMENTS))
    parser.add_argument("--training", action="append", default=[], choices=trainings, metavar="NAME|LIBRARY")
    parser.add_argument("--mode", action="append", default=[], choices=list(MODES))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave what the runs wrote there")
    parser.add_argument("--transformers-checkout", type=Path, metavar="FOLDER", default=CHECKOUT, help=(
        "a clone of transformers, for its example scripts (default: $MATRIX_TRANSFORMERS_CHECKOUT): "
        "those of the tag of the environment's version, else those that are checked out"))  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only write docs/matrix.md from the records")
    return parser.parse_args(words)


def versions_in(environment: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    command = [str(ENVIRONMENTS[environment].python), "-c", code, *PACKAGES]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def record(environment: str, marks: list[Mark]) -> None:
    """Write the marks, in place of earlier ones of the same cells."""
    file = table.RECORDS / f"{environment}.json"
    earlier: list[dict[str, Any]] = json.loads(file.read_text())["cells"] if file.exists() else []
    now = {"date": datetime.date.today().isoformat(), "commit": commit()}
    kept = {_key(cell): cell for cell in earlier} | {_key(mark.record()): mark.record() | now for mark in marks}
    order = {_key(_plain(cell)): place for place, cell in enumerate(cells([environment], [], []))}
    chosen = sorted((cell for key, cell in kept.items() if key in order), key=lambda cell: order[_key(cell)])
    content = {"packages": versions_in(environment), "cells": chosen}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def _plain(cell: Cell) -> dict[str, Any]:
    return Mark(cell, "").record()


def _key(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["library"], cell["training"], cell["mode"]


def run(environment: str, chosen: list[Cell], folder: Path, checkout: Path | None = None) -> list[Mark]:
    """Run the cells of one environment, and record the marks of each training as soon as all its modes have run.

    Raises:
        SystemExit: pip cannot make the environment, or `checkout` has no example scripts.
    """
    try:
        ENVIRONMENTS[environment].create()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"matrix: {environment} cannot be installed ({error}); pip's messages are above") from None
    scripts = checkout and examples(checkout, versions_in(environment)["transformers"], folder / environment)
    place = Environment(environment, folder, scripts)
    marks: list[Mark] = []
    for _, modes in groupby(enumerate(chosen, 1), key=lambda numbered: (numbered[1].script, numbered[1].training)):
        here: list[Mark] = []
        saved: list[tuple[Mark, Run]] = []
        for number, cell in modes:
            mark, left = place.mark(cell)
            what = f"{number}/{len(chosen)} {cell.library} {cell.training} {cell.mode}"
            print(f"matrix: {environment} {what}: {mark.mark} {mark.note}", file=sys.stderr, flush=True)
            if left is None:
                here.append(mark)
            else:
                saved.append((mark, left))
        here += place.check_saved(saved)
        record(environment, here)
        marks += here
    return marks


def main(words: Sequence[str]) -> int:
    """Return the exit code: 1 if a cell fails."""
    options = parsed(words)
    failing = 0
    with tempfile.TemporaryDirectory(prefix="matrix-") as place:
        chosen = [] if options.table else cells(options.environment, options.training, options.mode)
        if options.transformers_checkout is None:
            chosen = [cell for cell in chosen if cell.script != SCRIPT_OF_EXAMPLES]
        for environment in dict.fromkeys(cell.environment for cell in chosen):
            mine = [cell for cell in chosen if cell.environment == environment]
            marks = run(environment, mine, options.keep or Path(place), options.transformers_checkout)
            failing += sum(mark.mark == "fails" for mark in marks)
    table.write(REPOSITORY / "docs" / "matrix.md")
    return 1 if failing else 0
