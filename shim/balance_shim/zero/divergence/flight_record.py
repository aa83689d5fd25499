"""The notes of the ranks of one training: which modules each has run in its present pass, and where they part.

A pass is one forward and backward pass of a training step, or one forward pass outside of any. The notes are in files
that the ranks write through shared memory, one each, so that they outlive a rank that is aborted.
"""

import contextlib
import json
import mmap
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CAPACITY = 1 << 16  # modules run in one pass, and gradients made in it; those after them are not noted
EXPLAINED = "explained"  # a file: the ranks have printed the difference themselves
# Words ahead of the lists: number of the pass, of the step (negative: outside of it), whether the pass has ended well.
_PASS, _STEP, _ENDED, _HEADER = 0, 1, 2, 8
# The lists: modules of this pass and the one before, gradients likewise. Their lengths come first.
_LISTS = ("order", "last", "gradients", "last_gradients")
_LENGTH = {name: 3 + place for place, name in enumerate(_LISTS)}
_START = {name: _HEADER + place * CAPACITY for place, name in enumerate(_LISTS)}
_ORDER_LENGTH, _ORDER_START = _LENGTH["order"], _START["order"]
_GRADIENTS_LENGTH, _GRADIENTS_START = _LENGTH["gradients"], _START["gradients"]
_BYTES = (_HEADER + len(_LISTS) * CAPACITY) * array("l").itemsize


class FlightRecord:
    """The modules that one rank has run in its present pass.

    Attributes:
        names: of the modules, the same on all ranks.
        parameters: names of all that the backward pass reaches, the same on all ranks: parameters and modules.
        number: of the present pass, from 1.
        step: number of the present training step, from 1.
        inputs: names of the entries of its batch.
        failed: the type of the exception with which it has left the pass.
    """

    def __init__(self, names: list[str], parameters: list[str], rank: int, folder: str | None = None) -> None:
        self.names, self.parameters = names, parameters
        self.number = self.step = 0
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
            Path(folder, "names.json").write_text(json.dumps({"names": names, "parameters": parameters}))

    def begin(self, inputs: list[str], is_step: bool = True) -> None:
        """Begin the next pass, with a batch that holds `inputs`; `is_step`: it trains."""
        for present, last in (("order", "last"), ("gradients", "last_gradients")):
            count, start, to = self._words[_LENGTH[present]], _START[present], _START[last]
            # Lengths first: who reads meanwhile must not take these modules for those of the next pass.
            self._words[_LENGTH[present]] = self._words[_LENGTH[last]] = 0
            self._words[to : to + count] = self._words[start : start + count]
            self._words[_LENGTH[last]] = count
        self.number += 1
        self.step += is_step
        self.failed = ""
        self._words[_ENDED] = 0
        self._words[_PASS] = self.number
        self._words[_STEP] = self.step if is_step else -self.step
        if inputs != self.inputs:
            self.inputs = inputs
            self._describe()

    # Both run hundreds of times in a step, hence no common function.
    def add(self, index: int) -> None:
        """Note that the module `names[index]` begins to run."""
        words = self._words
        count = words[_ORDER_LENGTH]
        if count < CAPACITY:
            words[_ORDER_START + count] = index
            words[_ORDER_LENGTH] = count + 1

    def add_gradient(self, index: int) -> None:
        """Note that the backward pass has reached `parameters[index]`."""
        words = self._words
        count = words[_GRADIENTS_LENGTH]
        if count < CAPACITY:
            words[_GRADIENTS_START + count] = index
            words[_GRADIENTS_LENGTH] = count + 1

    def end(self) -> None:
        """Note that the present pass has ended well, so that modules missing in its notes have not run."""
        self._words[_ENDED] = 1

    def fail(self, error: BaseException) -> None:
        """Note that the pass has ended with `error`."""
        self.failed = type(error).__name__
        self._describe()

    @property
    def count(self) -> int:
        """How far the present pass has come."""
        return int(self._words[_LENGTH["order"]] + self._words[_LENGTH["gradients"]])

    @property
    def order(self) -> list[int]:
        """Indices of the modules that have begun to run in the present pass."""
        return _list(self._words, "order")

    @property
    def gradients(self) -> list[int]:
        """Indices of the names that the backward pass has reached in the present pass."""
        return _list(self._words, "gradients")

    def as_dict(self) -> dict[str, Any]:
        return {**_parts(self._words), "inputs": self.inputs, "failed": self.failed}

    def _describe(self) -> None:
        if self._description is None:
            return
        with contextlib.suppress(OSError):  # the disk is full: no reason to stop a training
            self._description.write_text(json.dumps({"inputs": self.inputs, "failed": self.failed}))


def read(folder: str) -> tuple[dict[int, dict[str, Any]], list[str], list[str]]:
    """Return the ranks' files in `folder`: their notes by rank, and the names of modules and parameters."""
    ranks = {}
    for file in Path(folder).glob("*.notes"):
        words = memoryview(file.read_bytes()).cast("l")
        description = file.with_suffix(".json")
        more = json.loads(description.read_text()) if description.exists() else {"inputs": [], "failed": ""}
        ranks[int(file.stem)] = {**_parts(words), **more}
    names = Path(folder, "names.json")
    both: Mapping[str, list[str]] = json.loads(names.read_text()) if names.exists() else {}
    return ranks, both.get("names", []), both.get("parameters", [])


def _parts(words: "memoryview[int]") -> dict[str, Any]:
    lists: dict[str, Any] = {name: _list(words, name) for name in _LISTS}
    return {"number": words[_PASS], "step": words[_STEP], "ended": bool(words[_ENDED]), **lists}


def _list(words: "memoryview[int]", name: str) -> list[int]:
    start = _START[name]
    return list(words[start : start + words[_LENGTH[name]]])
