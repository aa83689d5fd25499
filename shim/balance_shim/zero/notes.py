"""The notes of the ranks of one training: which modules each has run in its present step, and where they part.

They stand in files that the ranks write through shared memory, one each, so that they outlive a rank that is aborted.
"""

import contextlib
import json
import mmap
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "BALANCE_SHIM_NOTES"  # the launcher's variable
CAPACITY = 1 << 16  # modules run in one step; those after them are not noted
# Where in a rank's words things stand: the step, the number of modules run in it and in the one before; then those.
_ORDER, _LAST = 3, 3 + CAPACITY
_BYTES = (3 + 2 * CAPACITY) * array("l").itemsize
ADVICE = (
    "ZeRO-3 needs every rank to run the same modules: give each batch what they need (a picture, if only of one "
    "colour, in batches that have none), or sort the rows so that the ranks' batches are of one kind"
)


class Notes:
    """What one rank has run in its present step.

    Attributes:
        names: of the modules that count, the same on all ranks.
        step: number of the present forward and backward pass, from 1.
        order: indices of the modules that have begun to run in it.
        last: those of the step before, which says what was to be expected.
        inputs: names of what its batch holds.
        failed: the type of the exception with which it has left the step.
    """

    def __init__(self, names: list[str], rank: int, folder: str | None = None) -> None:
        self.names = names
        self.step = 0
        self.inputs: list[str] = []
        self.failed = ""
        self._words = memoryview(bytearray(_BYTES)).cast("l")
        self._description: Path | None = None
        if folder and os.path.isdir(folder):
            with open(os.path.join(folder, f"{rank}.notes"), "w+b") as file:
                # Not only its length: writing to what a full disk then has no room for would end the rank by SIGBUS.
                os.posix_fallocate(file.fileno(), 0, _BYTES)
                self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("l")
            self._description = Path(folder, f"{rank}.json")
            Path(folder, "names.json").write_text(json.dumps(names))

    def begin(self, inputs: list[str]) -> None:
        """Begin the next step, with a batch that holds `inputs`."""
        count = self._words[1]
        self._words[1] = 0  # first: who reads meanwhile must not take these modules for the next step's
        self._words[2] = 0
        self._words[_LAST : _LAST + count] = self._words[_ORDER : _ORDER + count]
        self._words[2] = count
        self.step += 1
        self.failed = ""
        self._words[0] = self.step
        if inputs != self.inputs:
            self.inputs = inputs
            self._describe()

    def add(self, index: int) -> None:
        """Note that the module `names[index]` begins to run."""
        count = self._words[1]
        if count < CAPACITY:
            self._words[_ORDER + count] = index
            self._words[1] = count + 1

    def fail(self, error: BaseException) -> None:
        """Note that the step has ended with `error`."""
        self.failed = type(error).__name__
        self._describe()

    @property
    def count(self) -> int:
        return int(self._words[1])

    @property
    def order(self) -> list[int]:
        return list(self._words[_ORDER : _ORDER + self._words[1]])

    def as_dict(self) -> dict[str, Any]:
        return {**_parts(self._words), "inputs": self.inputs, "failed": self.failed}

    def _describe(self) -> None:
        if self._description is None:
            return
        with contextlib.suppress(OSError):  # the disk is full: no reason to stop a training
            self._description.write_text(json.dumps({"inputs": self.inputs, "failed": self.failed}))


def read(folder: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the notes that the ranks have left in `folder`, by rank, and the names of the modules."""
    found = {}
    for file in Path(folder).glob("*.notes"):
        words = memoryview(file.read_bytes()).cast("l")
        description = file.with_suffix(".json")
        more = json.loads(description.read_text()) if description.exists() else {"inputs": [], "failed": ""}
        found[int(file.stem)] = {**_parts(words), **more}
    names = Path(folder, "names.json")
    return found, json.loads(names.read_text()) if names.exists() else []


def _parts(words: "memoryview[int]") -> dict[str, Any]:
    return {
        "step": words[0],
        "order": list(words[_ORDER : _ORDER + words[1]]),
        "last": list(words[_LAST : _LAST + words[2]]),
    }


def difference(notes: Mapping[int, Mapping[str, Any]], names: list[str]) -> str | None:
    """Return one line on the first module that not all ranks run; None where their notes agree as far as they go.

    Args:
        notes: by rank: `step`, `order` and `last` (indices into `names`), `inputs` (names of what the batch holds),
            `failed`.
    """
    if 0 not in notes:
        return None
    first = notes[0]
    for rank, other in sorted(notes.items()):
        if rank == 0 or other["step"] != first["step"]:
            continue
        ours, theirs = first["order"], other["order"]
        place = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        line = _which(rank, ours[place:], theirs[place:], first["last"][place:], names)
        if first["inputs"] != other["inputs"]:
            more = [
                sorted(set(a) - set(b))
                for a, b in ((first["inputs"], other["inputs"]), (other["inputs"], first["inputs"]))
            ]
            who, what = (0, more[0]) if more[0] else (rank, more[1])
            line += f"; only the batch of rank {who} has {', '.join(what)}"
        return f"ranks run different modules in step {first['step']}: {line}; {ADVICE}"
    waiting = any(not each["failed"] for each in notes.values())
    for rank, other in sorted(notes.items()):
        if waiting and other["failed"] not in ("", "RuntimeError", "AssertionError", "DistBackendError"):
            return f"rank {rank} has left step {other['step']} with {other['failed']}, and the others wait for it"
    return None


def _which(rank: int, ours: list[int], theirs: list[int], last: list[int], names: list[str]) -> str:
    """Return who skips what, given the orders from the first difference on, and from there that of the step before.

    Where the rank that runs all has not come far, only the step before tells what the other one has left out.
    """
    for skips, runs, skipped, order in ((rank, 0, ours, theirs), (0, rank, theirs, ours)):
        whole = last if last[:1] == skipped[:1] and order[0] in last else skipped
        if skipped[0] not in order and order[0] in whole:
            missing = [names[index] for index in whole[: whole.index(order[0])]]
            return f"rank {skips} skips {_group(missing)}, which rank {runs} runs"
    return f"rank 0 runs {names[ours[0]]} where rank {rank} runs {names[theirs[0]]}"


def _group(missing: list[str]) -> str:
    """Return the common parent of several modules, or the first and their number."""
    common = os.path.commonpath([name.replace(".", "/") for name in missing]).replace("/", ".")
    return common or f"{missing[0]} and {len(missing) - 1} more"
