"""Read a folder of `BALANCE_REPORT` into plain values, whatever part of it is there and whole."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ..errors import UsageError
from . import events, memory_record, run_record
from .memory_record import MemoryRecord
from .recorded_plan import PlanRecord, plan_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class Event:
    """One line of `events.jsonl`; see `report/events`."""

    kind: str
    level: str
    text: str
    time: float = 0.0
    rank: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SimulatedDevice:
    """A device of `simulation.json`. Bytes, and the share of the time in which it was busy, where that is known."""

    name: str
    peak: int
    reserved_peak: int
    busy: float | None = None


@dataclass(frozen=True)
class RunFolder:
    """The contents of a report folder on its latest run.

    Attributes:
        run: `run.json`; empty where there is none.
        remarks: what could not be read, a line each.
    """

    path: str
    run: Mapping[str, Any]
    plans: tuple[PlanRecord, ...]
    records: tuple[MemoryRecord, ...]
    events: tuple[Event, ...]
    simulated: tuple[SimulatedDevice, ...]
    remarks: tuple[str, ...]


def read(path: str) -> RunFolder:
    """Return the latest run in the folder `path`.

    Raises:
        UsageError: there is no such folder, nothing in it can be used, or a newer version has written it.
    """
    if not os.path.isdir(path):
        fault = "is a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{path} {fault}; name the folder that BALANCE_REPORT was set to")
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    remarks: list[str] = []
    run, plans = _run_and_plans(path, names, remarks)
    records = _records(path, run, names, remarks)
    simulated = _json(path, "simulation.json", names, remarks, _simulated) or ()
    started = float(run.get("started") or 0)
    logged = _all_events(path, names, started, remarks)
    if not run and not plans and not any(record.steps for record in records) and not logged:
        # What was found damaged explains the lack better than the advice to record something.
        raise UsageError(
            f"{path}: {'; '.join(remarks)}; nothing is left to report"
            if remarks
            else f"{path} has no record of a training; run it with BALANCE_REPORT={path} BALANCE_MONITOR=1"
        )
    logged.sort(key=lambda event: event.time)
    return RunFolder(path, run, plans, records, tuple(logged), tuple(simulated), tuple(remarks))


def ranks_and_plans(path: str) -> tuple[int, tuple[PlanRecord, ...]]:
    """Return the number of processes of the latest run, 0 if unknown, and its plans; without records of steps.

    Raises:
        OSError: the folder cannot be read.
        UsageError: a newer version has written it.
    """
    run, plans = _run_and_plans(path, sorted(os.listdir(path)), [])
    return int(run.get("ranks") or 0), plans


def out_of_memory(path: str) -> str:
    """Return where the latest run in the folder ran out of memory, in a line; "" if it did not.

    Raises:
        OSError: the folder cannot be read.
        UsageError: a newer version has written it.
    """
    names = sorted(os.listdir(path))
    run = _json(path, run_record.FILE, names, [], _run) or {}
    started = float(run.get("started") or 0)
    logged = _all_events(path, names, started, [])
    texts = [str(event.facts.get("headline") or event.text) for event in logged if event.kind == "out of memory"]
    return texts[-1].partition("\n")[0] if texts else ""


def ran_on_cpus(path: str) -> bool:
    """Whether the latest run in the folder had no accelerator, so that no memory was recorded."""
    try:
        run = _json(path, run_record.FILE, os.listdir(path), [], _run)
    except (OSError, UsageError):
        return False
    return run is not None and run.get("on_accelerator") is False


def _run_and_plans(path: str, names: list[str], remarks: list[str]) -> tuple[Mapping[str, Any], tuple[PlanRecord, ...]]:
    run = _json(path, run_record.FILE, names, remarks, _run) or {}
    numbers = [model.get("number") for model in run.get("models") or () if isinstance(model, Mapping)]
    plans = []
    for name in names:
        number = _number(name)
        if number is not None and (not run or number in numbers):
            plan = _json(path, name, names, remarks, partial(plan_of, number=number))
            plans += [plan] if plan is not None else []
    return run, tuple(sorted(plans, key=lambda plan: plan.number))


def _json(path: str, name: str, names: list[str], remarks: list[str], parse: Callable[[Any], _T]) -> _T | None:
    """Return the result of `parse` for a JSON file; None, with a remark, where it is damaged."""
    if name not in names:
        return None
    try:
        with open(os.path.join(path, name), encoding="utf-8") as file:
            return parse(json.load(file))
    except json.JSONDecodeError as error:
        remarks.append(f"{name} is not complete JSON (line {error.lineno}: {error.msg}) and is left out")
    except OSError as error:
        remarks.append(f"{name} cannot be read ({error.strerror}) and is left out")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        remarks.append(f"{name} does not have the fields of this version and is left out")
    return None


def _run(entry: Any) -> Mapping[str, Any]:
    if int(entry["format"]) > run_record.FORMAT:
        version = entry.get("balance_shim", "a newer version")
        raise UsageError(
            f"{run_record.FILE} was written by balance_shim {version}, format {entry['format']}; this version reads "
            f"format {run_record.FORMAT}: install that version to report on it"
        )
    for name in ("models", "records", "devices"):
        if not isinstance(entry[name], list):
            raise TypeError(name)
    for name in ("settings", "libraries", "workload"):
        if not isinstance(entry.get(name, {}), dict):
            raise TypeError(name)
    for name in ("started", "host_memory", "ranks"):
        if not 0 <= float(entry.get(name) or 0) < 1 << 62:
            raise ValueError(name)
    run: Mapping[str, Any] = entry
    return run


def _number(name: str) -> int | None:
    """Return the number of a plan's file: 1 for "plan.json", 2 for "plan-2.json"; None for another file."""
    stem, ending = os.path.splitext(name)
    digits = stem.removeprefix("plan-")
    if ending != ".json":
        return None
    return 1 if stem == "plan" else int(digits) if digits != stem and digits.isdecimal() else None


def _records(path: str, run: Mapping[str, Any], names: list[str], remarks: list[str]) -> tuple[MemoryRecord, ...]:
    """Return the records of the latest training, one for each rank."""
    started = float(run.get("started") or 0)
    written = [str(name) for name in run.get("records") or ()]

    def is_current(name: str) -> bool:
        key = memory_record.rank_and_number(name)
        if not run or key is None:
            return True
        if key[0] == 0:
            return name in written
        return os.path.getmtime(os.path.join(path, name)) >= started

    records = []
    for name in memory_record.newest(path, filter(is_current, names)):
        try:
            record = memory_record.read(os.path.join(path, name))
        except OSError as error:
            remarks.append(f"{name} cannot be read ({error.strerror}) and is left out")
            continue
        if record.cut_off:
            remarks.append(f"the last line of {name} is incomplete: the run still writes it, or was cut off")
        if record.skipped:
            remarks.append(f"{name}: {record.skipped} lines cannot be read and are left out")
        records.append(record)
    return tuple(records)


def _all_events(path: str, names: list[str], started: float, remarks: list[str]) -> list[Event]:
    return [event for name in names if name.startswith("events") for event in _events(path, name, started, remarks)]


def _events(path: str, name: str, started: float, remarks: list[str]) -> list[Event]:
    stem, rank = events.FILE.removesuffix(".jsonl"), 0
    if name != events.FILE:
        digits = name.removeprefix(f"{stem}-rank").removesuffix(".jsonl")
        if not digits.isdecimal():
            return []
        rank = int(digits)
    logged, bad = [], 0
    try:
        with open(os.path.join(path, name), encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    entry = json.loads(line)
                    event = Event(
                        str(entry["kind"]), str(entry["level"]), str(entry["text"]), float(entry["time"]), rank, entry
                    )
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    bad += 1
                    continue
                if event.time >= started:
                    logged.append(event)
    except OSError as error:
        remarks.append(f"{name} cannot be read ({error.strerror}) and is left out")
    if bad:
        remarks.append(f"{name}: {bad} lines cannot be read and are left out")
    return logged


def _simulated(entry: Any) -> tuple[SimulatedDevice, ...]:
    return tuple(
        SimulatedDevice(
            str(device["name"]),
            int(device["peak"]),
            int(device["reserved_peak"]),
            None if device.get("busy") is None else float(device["busy"]),
        )
        for device in entry
    )
