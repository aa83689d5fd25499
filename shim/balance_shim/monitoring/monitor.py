"""`BALANCE_MONITOR=1`: one training watched, from its first step to its end."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import devices, log
from ..patching.guard import attempt
from ..placement.plan import Plan
from ..report import run_record
from ..settings import Settings
from ..upstream.trainer import TrainerLike
from . import report
from .allocation_sites import Makers
from .batch import BatchSize, size_of
from .diagnosis import Finding, Growth, Step
from .files import Lines, folder_for, free_name
from .history import History
from .leak_search import Kept, search
from .other_processes import paged_state, processes_on
from .readings import Meter, Reading

# The part of the training's time that asking drivers for free memory may take; with it they are asked less often.
BUDGET = 0.001


class Monitor:
    """Monitors one call of `Trainer.train`.

    A failure in here ends the monitoring with one warning; training continues.
    """

    def __init__(self, trainer: TrainerLike, meter: Meter, plan: Plan | None, settings: Settings) -> None:
        self._trainer, self._meter, self._plan, self._settings = trainer, meter, plan, settings
        self._growth = Growth(meter.names, meter.totals, lambda: meter.exact)
        rank = int(getattr(trainer.args, "process_index", 0))
        self._stem = f"memory-rank{rank}" if rank else "memory"
        self._folder = folder_for(settings.report, trainer.args.output_dir)
        self._lines = Lines(self._folder, self._stem)
        self._history = History(meter.names, meter.totals)
        self._batches: list[BatchSize] = []
        self._disturbed = False  # whether something other than steps may have used the devices since the last step
        self._pending: Finding | None = None
        self._kept: Finding | None = None
        self._makers: Makers | None = None
        self._since_log: dict[str, int] = {}
        self._ask_again = 0.0  # when drivers may be asked again
        self._asking = float("inf")  # seconds that this takes; the least seen, as a process may be kept waiting in it
        self._busy: dict[str, float] = {}  # shares of the time, where they were asked for
        self._between: tuple[int, ...] | None = None
        self._step_began = time.perf_counter()
        self.spent = 0.0  # seconds in here
        self.steps = 0
        self.running = True

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Call `function`, unless watching has ended; a failure ends it."""
        if not self.running:
            return
        began = time.perf_counter()
        done = attempt("watching memory", _done, function, args, default=False, instead="monitoring stops")
        self.spent += time.perf_counter() - began
        if not done:
            self.running = False
            if self._makers is not None:
                attempt("watching memory", self._makers.stop)

    def replanned(self, plan: Plan) -> None:
        """Take the plan whose peaks are the predicted ones from now on."""
        self._plan = plan

    def train_begin(self) -> None:
        self._batches.clear()  # of an attempt before this one: the Trainer may look for a batch size by itself
        self._meter.reset_peaks()
        self._meter.paged = paged_state(self._trainer.optimizer)  # there already where a training is resumed
        readings = self._meter.read()
        for finding in self._growth.start(readings):
            self._say(finding)

    def step_begin(self) -> None:
        self._step_began = time.perf_counter()
        self._between = self._meter.peaks() if self._disturbed else None
        self._disturbed = False
        self._meter.reset_peaks()
        if self._pending is not None and self._makers is None:
            self._makers = Makers(self._trainer.model)
            self._makers.start()

    @property
    def kept(self) -> Finding | None:
        """The finding of memory retained from step to step, if there is one."""
        return self._kept

    @property
    def largest(self) -> int:
        """Elements of the largest micro-batch of the steps so far."""
        return self._growth.largest

    def batch(self, inputs: Any) -> None:
        """Take the inputs of a micro-batch."""
        self._batches.append(size_of(inputs))

    def disturbed(self) -> None:
        """Note that an evaluation or a saving has used the devices between two steps."""
        self._disturbed = True

    def step_end(self, number: int) -> None:
        seconds = time.perf_counter() - self._step_began
        readings = self._read()
        self._note_for_log(readings)
        batches, self._batches = self._batches, []
        largest = max(batches, key=lambda batch: batch.elements, default=BatchSize())
        step = Step(
            number, largest.elements, largest.tokens, sum(batch.bytes for batch in batches), readings, self._between
        )
        self.steps += 1
        findings = self._growth.add(step)
        to_log = [self._explained()] if self._makers is not None else []
        for finding in findings:
            if finding.kind == "kept":
                self._kept = self._pending = finding  # said after the next step, which is looked at more closely
            else:
                to_log.append(finding)
        for finding in to_log:
            self._say(finding)
        self._history.add(number, readings)
        self._record(self._entry(step, seconds, batches, to_log))

    def logged(self) -> None:
        """Write the highest readings since the last write to the run's own TensorBoard."""
        writer = _tensorboard(self._trainer)
        if writer is not None:
            for name, value in self._since_log.items():
                writer.add_scalar(name, value / 2**30, self._trainer.state.global_step)
        self._since_log.clear()

    def finish(self) -> None:
        """Log pending findings, and write the picture, whether the training ended or failed."""
        if self._pending is not None:
            self._say(self._explained())
        if self._batches:  # a step that failed half-way
            readings = self._meter.read()
            number = self._trainer.state.global_step + 1
            self._history.add(number, readings)
            size = max(self._batches, key=lambda batch: batch.elements)
            step = Step(number, size.elements, size.tokens, 0, readings)
            entry = self._entry(step, time.perf_counter() - self._step_began, self._batches, [])
            self._record({**entry, "unfinished": True})
        self._lines.close()
        if not self._history.points or not log.is_first_process():
            return
        predicted = self._predicted()
        if self._settings.report != "off":
            log.info(report.predicted_and_measured(self._history, predicted))
            if self._lines.path:
                log.info(f"memory of each step: {self._lines.path}")
        if self._settings.report not in ("text", "off"):
            path = free_name(self._settings.report, self._stem, "svg")
            with open(path, "w", encoding="utf-8") as file:
                file.write(report.picture(self._history, predicted))

    def _record(self, entry: dict[str, Any]) -> None:
        is_first = not self._lines.path
        self._lines.add(entry)
        folder = self._settings.report
        if is_first and self._lines.path and folder not in ("text", "off") and log.is_first_process():
            run_record.add_record(folder, self._lines.path, self._meter.indices)

    def _read(self) -> tuple[Reading, ...]:
        """Return readings, with the memory of other processes as often as the budget allows."""
        began = time.perf_counter()
        asking = began >= self._ask_again
        if asking:
            self._meter.paged = paged_state(self._trainer.optimizer)
        readings = self._meter.read(with_others=asking)
        self._busy = self._meter.busy() if asking else {}
        if readings[0].others is not None:
            ended = time.perf_counter()
            self._asking = min(self._asking, ended - began)
            self._ask_again = ended + self._asking / BUDGET
        return readings

    def _explained(self) -> Finding:
        """Return the pending finding with the holder of the retained tensors, and where they were made."""
        finding, makers = self._pending, self._makers
        self._pending = self._makers = None
        assert finding is not None
        if makers is not None:
            makers.stop()
        retained: Kept | None = search(self._meter.kind, self._trainer.model, self._trainer.optimizer, self)
        if retained is None:
            return finding._replace(text=f"{finding.text}; no tensor that Python can reach explains it")
        origin = makers.of(retained.tensors) if makers is not None else ""
        return finding._replace(text=f"{finding.text}. {retained.describe()}{f'; {origin}' if origin else ''}")

    def _say(self, finding: Finding) -> None:
        text = finding.text
        if finding.kind in ("occupied", "others"):
            owners = processes_on(self._meter.kind, self._meter.indices[finding.devices[0]])
            text += f" ({owners})" if owners else ""
        log.warning(text, finding.kind, {"since": finding.step})

    def _note_for_log(self, readings: tuple[Reading, ...]) -> None:
        for device, reading in enumerate(readings):
            for field, value in reading._asdict().items():
                if value is not None:
                    name = f"memory_GiB/{self._meter.names[device]}/{field}"
                    self._since_log[name] = max(value, self._since_log.get(name, 0))

    def _busy_of(self, name: str) -> dict[str, float]:
        return {"busy": self._busy[name]} if name in self._busy else {}

    def _predicted(self) -> Mapping[str, int]:
        if self._plan is None:
            return {}
        return {device.name: device.predicted_peak for device in self._plan.devices}

    def _entry(self, step: Step, seconds: float, batches: list[BatchSize], findings: list[Finding]) -> dict[str, Any]:
        predicted = self._predicted()
        entry: dict[str, Any] = {
            "step": step.number,
            "seconds": round(seconds, 6),
            "tokens": sum(batch.tokens for batch in batches),
            "micro_batches": [[batch.batch_size, batch.seq_len] for batch in batches],
            "devices": {
                name: {**reading._asdict(), "total": total, "predicted": predicted.get(name), **self._busy_of(name)}
                for name, reading, total in zip(self._meter.names, step.readings, self._meter.totals, strict=True)
            },
        }
        if findings:
            entry["findings"] = [
                {"kind": finding.kind, "since": finding.step, "text": finding.text} for finding in findings
            ]
        return entry


def _done(function: Callable[..., None], args: tuple[Any, ...]) -> bool:
    function(*args)
    return True


def _tensorboard(trainer: TrainerLike) -> Any:
    """Return the writer of transformers' TensorBoard callback, if this run has one."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback":
            return getattr(callback, "tb_writer", None)
    return None


def watched_devices(trainer: TrainerLike, plan: Plan | None) -> tuple[str, list[int]] | None:
    """Return the type and indices of the devices that this training uses; None where there is no accelerator.

    No others: to ask a device about its memory makes a context on it, which takes memory itself.
    """
    kind = devices.accelerator_type()
    if kind is None:
        return None
    indices = {parameter.device.index or 0 for parameter in trainer.model.parameters() if parameter.device.type == kind}
    first_device = trainer.args.device
    if first_device.type == kind:
        indices.add(first_device.index or 0)
    if plan is not None:
        indices |= {device.device.index for device in plan.devices}
    return (kind, sorted(indices)) if indices else None
