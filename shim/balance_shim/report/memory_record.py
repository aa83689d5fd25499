"""Read `memory.jsonl`, the record of a monitored training, also one that is still being written or was cut off."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

NAME = re.compile(r"memory(?:-rank(\d+))?(?:-(\d+))?\.jsonl")
MOST = 1 << 62  # bytes: more is damage
SIZES = ("allocated", "reserved", "peak", "others", "total", "predicted")  # in the order of `DeviceReading`


class DeviceReading(NamedTuple):  # a tuple, as a long training has a million of them
    """One device at the end of a step. Bytes; None where the record does not tell.

    Attributes:
        predicted: the peak that the plan in force predicts.
        busy: the share of the time in which the device computed, 0 to 1.
    """

    allocated: int = 0
    reserved: int = 0
    peak: int = 0
    others: int | None = None
    total: int | None = None
    predicted: int | None = None
    busy: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        seconds: that it took, with what the program did in between.
        tokens: of all its micro-batches, padding included.
        devices: by name.
        findings: each a dict with `kind`, `since` (a step) and `text`.
        unfinished: whether the step failed.
    """

    step: int
    seconds: float = 0.0
    tokens: int = 0
    micro_batches: tuple[tuple[int, int], ...] = ()
    devices: Mapping[str, DeviceReading] = field(default_factory=dict)
    findings: tuple[Mapping[str, Any], ...] = ()
    unfinished: bool = False


@dataclass(frozen=True)
class MemoryRecord:
    """The steps of one rank of one training, in order.

    Attributes:
        skipped: lines in the middle that could not be read.
        cut_off: whether the last line is incomplete.
    """

    file: str
    rank: int
    steps: tuple[StepRecord, ...]
    skipped: int = 0
    cut_off: bool = False

    def highest(self, quantity: str) -> dict[str, int]:
        """Return the most of "peak", "allocated", "reserved" or "others" on each device."""
        value_of = attrgetter(quantity)
        return {
            name: max(filter(None, map(value_of, readings)), default=0) for name, readings in self._readings.items()
        }

    def last(self, quantity: str) -> dict[str, Any]:
        """Return the last known `quantity` of each device."""
        value_of = attrgetter(quantity)
        values = {
            name: next((value for value in map(value_of, reversed(readings)) if value is not None), None)
            for name, readings in self._readings.items()
        }
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def _readings(self) -> Mapping[str, list[DeviceReading]]:
        """The readings of each device, in the order of the steps."""
        readings: dict[str, list[DeviceReading]] = {}
        for step in self.steps:
            for name, reading in step.devices.items():
                readings.setdefault(name, []).append(reading)
        return readings


def read(path: str) -> MemoryRecord:
    """Return the record in `path`.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        return _record(path, file)


def step_of(line: str) -> StepRecord | None:
    """Return the step that a line holds; None if it is not one, or incomplete."""
    try:
        entry = json.loads(line)
        devices = {str(name): _reading(reading) for name, reading in entry["devices"].items()}
        return StepRecord(
            step=int(entry["step"]),
            seconds=_duration(entry.get("seconds")),
            tokens=int(entry.get("tokens") or 0),
            micro_batches=tuple((int(rows), int(tokens)) for rows, tokens in entry.get("micro_batches") or ()),
            devices=devices,
            findings=tuple(finding for finding in entry.get("findings") or () if isinstance(finding["kind"], str)),
            unfinished=bool(entry.get("unfinished")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def rank_and_number(name: str) -> tuple[int, int] | None:
    """Return the rank and the training's number of a file called `name`; None if it is no record."""
    match = NAME.fullmatch(name)
    return None if match is None else (int(match[1] or 0), int(match[2] or 1))


def newest(folder: str, names: Iterable[str] | None = None) -> list[str]:
    """Return the file of the latest training of each rank, by rank, of `names` or of all files in `folder`."""
    latest: dict[int, tuple[int, str]] = {}
    for name in os.listdir(folder) if names is None else names:
        key = rank_and_number(name)
        if key is not None and os.path.isfile(os.path.join(folder, name)):
            rank, number = key
            latest[rank] = max(latest.get(rank, (0, "")), (number, name))
    return [latest[rank][1] for rank in sorted(latest)]


def _record(path: str, lines: Iterable[str]) -> MemoryRecord:
    name = os.path.basename(path)
    rank, _ = rank_and_number(name) or (0, 1)
    steps, skipped, last_is_bad, last = [], 0, False, "\n"
    for line in lines:
        if not line.strip():
            continue
        skipped += last_is_bad
        step = step_of(line)
        last, last_is_bad = line, step is None
        if step is not None:
            steps.append(step)
    cut_off = last_is_bad and not last.endswith("\n")
    return MemoryRecord(name, rank, tuple(steps), skipped + (last_is_bad and not cut_off), cut_off)


def _duration(value: Any) -> float:
    seconds = float(value or 0)
    return seconds if 0 <= seconds < float("inf") else 0.0  # JSON of Python has NaN and Infinity


def _reading(entry: Any) -> DeviceReading:
    get = entry.get
    sizes = [None if (size := get(name)) is None else int(size) for name in SIZES]
    if any(size is not None and not 0 <= size < MOST for size in sizes):
        raise ValueError(sizes)
    allocated, reserved, peak, others, total, predicted = sizes
    busy = get("busy")
    share = None if busy is None else float(busy)
    if share is not None and not 0 <= share <= 1:  # NaN, too
        share = None
    return DeviceReading(allocated or 0, reserved or 0, peak or 0, others, total, predicted, share)
