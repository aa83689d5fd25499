"""The cause of growing memory: longer batches, tensors kept alive, a cache, fragmentation, other processes.

Pure functions of what was read at the end of each step; nothing here asks a device. The thresholds are parts of the
device's memory, so that the same rules hold for devices of all sizes. They are chosen so that healthy runs (varied
lengths, accumulation, evaluation and saving in between, optimizer state that appears late) raise no alarm;
`benchmarks/growth_false_alarms.py` counts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from ..units import format_size
from .readings import Reading
from .trend import SteadyRises, began

KEPT = 0.001  # of the device: what tensors kept alive must add up to before it is reported
OCCUPIED = 0.1  # what others have at the start
OTHERS_GROWN = 0.05  # what others have taken since, ...
GROWN_AT_LEAST = 1 << 30  # ... and where kernels and communication buffers of our own count as theirs, this many bytes
FRAGMENTED = 0.1  # what the allocator holds beyond any peak so far, ...
FRAGMENTING = 0.02  # ... and what of it a window must have added
CACHED, SQUEEZED, CACHED_STEPS = 0.2, 0.05, 10  # unused by steps for so long, while so little is free
LONG_BATCH, BATCHES_BEFORE = 4, 10  # times as large as all before, of which there must be some
FULL = 0.92  # of what others leave: what makes growing batches worth a line
HISTORY = 700  # steps looked back for the beginning of a rise; the longest window has 640


class Step(NamedTuple):
    """The measurements of one optimizer step.

    Attributes:
        number: the Trainer's global step, from 1.
        size: elements of all inputs of its largest micro-batch, which is what activations follow.
        tokens: tokens of that micro-batch, padding included; 0 where inputs have no `input_ids`.
        input_bytes: of all inputs of its micro-batches, which are still there when the step ends.
        readings: one a device.
        between: the peaks between the step before and this one (evaluation, saving), where somebody looked.
    """

    number: int
    size: int
    tokens: int
    input_bytes: int
    readings: tuple[Reading, ...]
    between: tuple[int, ...] | None = None


FindingKind = Literal["kept", "long batch", "longer batches", "fragmentation", "cache", "occupied", "others"]


class Finding(NamedTuple):
    """Something that a user should know. `kind` is "kept", "long batch", "longer batches", "fragmentation", "cache",
    "occupied" or "others"; `step` is where it began; `devices` are positions; `rate` is bytes a step on the worst."""

    kind: FindingKind
    step: int
    devices: tuple[int, ...]
    text: str
    rate: float = 0


class Growth:
    """Examines step after step and reports each kind of finding once.

    `exact`: whether readings tell other processes from what CUDA itself takes; it may become False while it runs.
    """

    def __init__(self, names: Sequence[str], totals: Sequence[int], exact: Callable[[], bool] = lambda: True) -> None:
        self._exact = exact
        self._names, self._totals = tuple(names), tuple(totals)
        self._kept = [SteadyRises(KEPT * total) for total in totals]
        self._slack = [SteadyRises(FRAGMENTING * total, (8, 32, 128)) for total in totals]
        self._history: deque[tuple[int, tuple[int, ...], tuple[int, ...]]] = deque(maxlen=HISTORY)
        self._steps = 0
        self._largest = 0  # size of a batch so far
        self._early_size = 0
        self._early_peaks = [0] * len(names)
        self._step_peaks = [0] * len(names)  # the most in any step so far, ...
        self._peaks = [0] * len(names)  # ... and at any time
        self._base: list[int | None] = [None] * len(names)  # what others had at the start
        self._others = [0] * len(names)
        self._unused = [0] * len(names)  # for how many steps a cache has been lying idle
        self._told: set[str] = set()

    @property
    def largest(self) -> int:
        """The largest `size` so far."""
        return self._largest

    def start(self, readings: Sequence[Reading]) -> list[Finding]:
        """Take the readings before the first step."""
        findings = []
        for device, reading in enumerate(readings):
            self._base[device] = self._others[device] = reading.others or 0
            part = (reading.others or 0) / self._totals[device]
            if part >= OCCUPIED:
                text = (
                    f"{self._names[device]} starts {part:.0%} full: {format_size(reading.others or 0)} of "
                    f"{format_size(self._totals[device])} are used by {self._who()}"
                )
                findings.append(Finding("occupied", 0, (device,), text))
        return findings

    def add(self, step: Step) -> list[Finding]:
        """Take a step and return the new findings."""
        self._steps += 1
        if step.between is not None:
            self._peaks = list(map(max, self._peaks, step.between))
        floors = tuple(reading.allocated for reading in step.readings)
        slacks = tuple(
            max(0, reading.reserved - max(peak, reading.peak))
            for reading, peak in zip(step.readings, self._peaks, strict=True)
        )
        self._history.append((step.number, floors, slacks))
        findings = [*self._others_grown(step), *self._kept_alive(step), *self._batches(step)]
        findings += [*self._fragmentation(slacks), *self._idle_cache(step)]
        peaks = [reading.peak for reading in step.readings]
        self._step_peaks = list(map(max, self._step_peaks, peaks))
        self._peaks = list(map(max, self._peaks, peaks))
        self._largest = max(self._largest, step.size)
        if self._steps <= BATCHES_BEFORE:
            self._early_size, self._early_peaks = self._largest, list(self._step_peaks)
        return findings

    def _who(self) -> str:
        return "other processes" if self._exact() else "other processes (or CUDA itself)"

    def _kept_alive(self, step: Step) -> list[Finding]:
        rates = [
            rises.add(reading.allocated, step.input_bytes)
            for rises, reading in zip(self._kept, step.readings, strict=True)
        ]
        if "kept" in self._told or not any(rates):
            return []
        self._told.add("kept")
        worst = max(range(len(rates)), key=lambda device: (rates[device] or 0) / self._totals[device])
        first = began([floors[worst] for _, floors, _ in self._history])
        since, before = self._history[first][0], self._history[max(0, first - 1)][1]
        growing = len(self._history) - max(1, first)
        grown = [now.allocated - then for now, then in zip(step.readings, before, strict=True)]
        devices = tuple(device for device, size in enumerate(grown) if size >= KEPT * self._totals[device] / 4)
        devices = devices or (worst,)
        rate = max(1.0, grown[worst] / growing)
        # What a step needs on top of what stays is free again at its end.
        reading = step.readings[worst]
        room = self._totals[worst] - self._others[worst] - reading.allocated - (reading.peak - reading.allocated)
        text = (
            f"retained memory grows on {', '.join(self._names[device] for device in devices)} since "
            f"step {since}, by {format_size(rate)} per step on {self._names[worst]}, which will be full at about step "
            f"{step.number + int(max(0, room) / rate)}"
        )
        return [Finding("kept", since, devices, text, rate)]

    def _batches(self, step: Step) -> list[Finding]:
        higher = [
            device
            for device, reading in enumerate(step.readings)
            if reading.peak - self._step_peaks[device]
            >= max(0.1 * self._step_peaks[device], 0.01 * self._totals[device])
        ]
        if self._steps > BATCHES_BEFORE and higher and step.size >= LONG_BATCH * self._largest:
            if "long batch" in self._told:
                return []
            self._told.add("long batch")
            worst = max(higher, key=lambda device: step.readings[device].peak / self._totals[device])
            text = (
                f"the batch of step {step.number} is {step.size / self._largest:.1f} times as large as any before "
                f"({_amount(step)}): it took {self._names[worst]} from {format_size(self._step_peaks[worst])} to "
                f"{format_size(step.readings[worst].peak)}"
            )
            return [Finding("long batch", step.number, tuple(higher), text)]
        return self._longer_batches(step)

    def _longer_batches(self, step: Step) -> list[Finding]:
        full = [
            device
            for device, reading in enumerate(step.readings)
            if reading.peak >= FULL * (self._totals[device] - self._others[device])
            and reading.peak >= 1.1 * self._early_peaks[device]
        ]
        longer = self._steps > BATCHES_BEFORE and step.size > 1.2 * self._early_size
        if not full or not longer or self._told & {"longer batches", "kept"}:
            return []
        self._told.add("longer batches")
        worst = full[0]
        text = (
            f"{self._names[worst]} has been almost full since step {step.number}, because batches grew: "
            f"{format_size(self._early_peaks[worst])} in the first steps, {format_size(step.readings[worst].peak)} "
            f"now, with a batch {step.size / max(1, self._early_size):.1f} times as large ({_amount(step)})"
        )
        return [Finding("longer batches", step.number, tuple(full), text)]

    def _fragmentation(self, slacks: Sequence[int]) -> list[Finding]:
        findings = []
        for device, slack in enumerate(slacks):
            rate = self._slack[device].add(slack)
            if rate is None or slack < FRAGMENTED * self._totals[device] or "fragmentation" in self._told:
                continue
            self._told.add("fragmentation")
            since = self._history[began([values_by_step[device] for _, _, values_by_step in self._history])][0]
            text = (
                f"fragmentation on {self._names[device]} since step {since}: the allocator holds {format_size(slack)} "
                f"more than tensors have ever needed, {format_size(rate)} more each step; "
                "PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9) usually helps"
            )
            findings.append(Finding("fragmentation", since, (device,), text, rate))
        return findings

    def _idle_cache(self, step: Step) -> list[Finding]:
        findings = []
        for device, reading in enumerate(step.readings):
            total = self._totals[device]
            # What evaluation or saving needed between steps, and the allocator has not given back.
            needed = max(self._step_peaks[device], reading.peak)
            idle = min(reading.reserved, self._peaks[device]) - needed
            free = total - reading.reserved - self._others[device]
            cached = idle >= CACHED * total and free < SQUEEZED * total
            self._unused[device] = self._unused[device] + 1 if cached else 0
            if self._unused[device] >= CACHED_STEPS and "cache" not in self._told:
                self._told.add("cache")
                since = step.number - CACHED_STEPS + 1
                text = (
                    f"{self._names[device]} has {format_size(idle)} in the allocator's cache since step {since} that "
                    f"steps do not use (evaluation or saving did), and only {format_size(max(0, free))} free; "
                    "torch_empty_cache_steps in the TrainingArguments, or a smaller evaluation batch, releases it"
                )
                findings.append(Finding("cache", since, (device,), text))
        return findings

    def _others_grown(self, step: Step) -> list[Finding]:
        findings = []
        for device, reading in enumerate(step.readings):
            if reading.others is None:
                continue
            base = self._base[device]
            if base is None:
                base = self._base[device] = reading.others
            self._others[device] = reading.others
            least = max(OTHERS_GROWN * self._totals[device], 0 if self._exact() else GROWN_AT_LEAST)
            if reading.others - base >= least:
                self._base[device] = reading.others
                text = (
                    f"{self._who()} took {format_size(reading.others - base)} of {self._names[device]} by step "
                    f"{step.number}; they use {format_size(reading.others)} of {format_size(self._totals[device])} now"
                )
                findings.append(Finding("others", step.number, (device,), text))
        return findings


def _amount(step: Step) -> str:
    return f"{step.tokens} tokens" if step.tokens else f"{step.size} numbers"
