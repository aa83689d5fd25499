"""Follow `memory.jsonl` of every rank in a folder: new lines since the last look, the files of the newest training."""

import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from ...errors import UsageError
from .. import folder as report_folder
from .. import memory_record
from ..memory_record import DeviceReading, StepRecord

RECENT = 10  # steps over which speed is averaged


class LiveDevice(NamedTuple):
    """One device now. Bytes; `busy` is a share, and `busy_is_predicted` whether it is the plan's."""

    rank: int
    name: str
    now: int
    peak: int
    predicted: int | None
    total: int | None
    busy: float | None
    busy_is_predicted: bool


class Snapshot(NamedTuple):
    """The training now.

    Attributes:
        step: the last one of the first rank.
        seconds: of a step, averaged over the last ones; 0 if unknown.
        tokens_per_second: of all ranks.
        age: seconds since the record was written to.
        finding: the latest, as (step, text); None for none.
        unfinished: whether the last step failed.
        failure: where it ran out of memory; "" for another reason.
    """

    step: int
    seconds: float
    tokens_per_second: float
    age: float
    devices: tuple[LiveDevice, ...]
    finding: tuple[int, str] | None
    unfinished: bool
    failure: str
    ranks: int


@dataclass
class _Tail:
    """One rank's file, read up to `offset`."""

    name: str
    rank: int
    offset: int = 0
    rest: bytes = b""
    latest: dict[str, DeviceReading] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    recent: "deque[tuple[float, int]]" = field(default_factory=lambda: deque(maxlen=RECENT))
    step: int = 0
    finding: tuple[int, str] | None = None
    unfinished: bool = False
    changed: float = 0.0

    def read(self, folder: str) -> None:
        path = os.path.join(folder, self.name)
        status = os.stat(path)
        if status.st_size < self.offset:  # made anew
            self.__init__(self.name, self.rank)  # type: ignore[misc]
        self.changed = status.st_mtime
        with open(path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            step = memory_record.step_of(line.decode("utf-8", "replace"))
            if step is not None:
                self._take(step)

    def _take(self, step: StepRecord) -> None:
        self.step, self.unfinished = step.step, step.unfinished
        if step.seconds and not step.unfinished:
            self.recent.append((step.seconds, step.tokens))
        for name, reading in step.devices.items():
            self.latest[name] = reading
            self.peaks[name] = max(self.peaks.get(name, 0), reading.peak)
            if reading.busy is not None:
                self.busy[name] = reading.busy
        for finding in step.findings:
            self.finding = (step.step, str(finding.get("text")))


class Follower:
    """Follows the newest training in a folder, whatever the number of its ranks."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tails: dict[int, _Tail] = {}
        self._written = 0.0  # when the plan was
        self._ranks = 0  # of the run; 0: unknown
        self._busy: dict[str, float] = {}  # shares that the plan predicts

    def look(self) -> Snapshot | None:
        """Read the new lines and return the training as it is now; None while there is no record.

        Raises:
            OSError: the folder cannot be read.
        """
        if not os.path.isdir(self._folder):
            return None
        newest = memory_record.newest(self._folder)
        for name in newest:
            key = memory_record.rank_and_number(name)
            assert key is not None
            if key[0] not in self._tails or self._tails[key[0]].name != name:
                self._tails[key[0]] = _Tail(name, key[0])
        tails = [self._tails[rank] for rank in sorted(self._tails) if self._tails[rank].name in newest]
        for tail in tails:
            tail.read(self._folder)
        self._read_plan()
        # There may be ranks of an earlier training in the same folder.
        current = [tail for tail in tails if tail.latest and (not self._ranks or tail.rank < self._ranks)]
        return self._snapshot(current) if current else None

    def _snapshot(self, tails: list[_Tail]) -> Snapshot:
        first = tails[0]
        unfinished = any(tail.unfinished for tail in tails)
        times = [seconds for seconds, _ in first.recent]
        rates = [
            sum(tokens for _, tokens in tail.recent) / spent
            for tail in tails
            if (spent := sum(seconds for seconds, _ in tail.recent))
        ]
        devices = tuple(
            LiveDevice(
                tail.rank,
                name,
                reading.allocated,
                tail.peaks[name],
                reading.predicted,
                reading.total,
                tail.busy.get(name, self._busy.get(name)),
                name not in tail.busy,
            )
            for tail in tails
            for name, reading in tail.latest.items()
        )
        return Snapshot(
            step=first.step,
            seconds=sum(times) / len(times) if times else 0.0,
            tokens_per_second=sum(rates),
            age=max(0.0, time.time() - max(tail.changed for tail in tails)),
            devices=devices,
            finding=next((tail.finding for tail in tails if tail.finding), None),
            unfinished=unfinished,
            failure=self._failure() if unfinished else "",
            ranks=len(tails),
        )

    def _failure(self) -> str:
        with suppress(UsageError):  # a newer version's
            return report_folder.out_of_memory(self._folder)
        return ""

    def _read_plan(self) -> None:
        """Read the number of ranks, and the busy shares of the first plan, if they were written since."""
        names = (os.path.join(self._folder, name) for name in ("run.json", "plan.json"))
        written = max((os.path.getmtime(name) for name in names if os.path.exists(name)), default=0.0)
        if written == self._written:
            return
        with suppress(UsageError):  # a newer version's: without shares
            self._ranks, plans = report_folder.ranks_and_plans(self._folder)
            time_of = plans[0].step_time if plans else None
            self._busy = dict(time_of.busy) if time_of is not None else {}
        self._written = written
