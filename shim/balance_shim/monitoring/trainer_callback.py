"""The seam's side of this room: begins and ends the monitor of a training, and passes it the Trainer's events."""

from typing import Any

from .. import log, state
from ..placement.plan import Plan
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from .monitor import Monitor, watched_devices
from .readings import Meter


def begin(trainer: TrainerLike, plan: Plan | None) -> None:
    """Watch `trainer`, if the settings ask for it and there is something to watch."""
    settings = state.settings()
    if not settings.monitor:
        return
    watched = watched_devices(trainer, plan)
    if watched is None:
        log.once("info", "BALANCE_MONITOR=1: the model is not on an accelerator, so no memory is monitored")
        return
    monitor = Monitor(trainer, Meter(*watched), plan, settings)
    callback = _callback(monitor)
    trainer.add_callback(callback)
    _MONITOR.keep(trainer, (monitor, callback))


def saw_batch(trainer: TrainerLike, inputs: Any) -> None:
    """Record the inputs of a micro-batch, if memory is monitored."""
    monitor = monitor_of(trainer)
    if monitor is not None:
        monitor.guarded(monitor.batch, inputs)


def monitor_of(trainer: TrainerLike) -> Monitor | None:
    """Return the monitor of `trainer`, if it has one."""
    watching = _MONITOR.of(trainer)
    return None if watching is None else watching[0]


def replanned(trainer: TrainerLike, plan: Plan) -> None:
    """Take the plan of a map that has been put in force while training."""
    monitor = monitor_of(trainer)
    if monitor is not None:
        monitor.guarded(monitor.replanned, plan)


def _end(trainer: TrainerLike, watching: tuple[Monitor, Any]) -> None:
    monitor, callback = watching
    monitor.guarded(monitor.finish)
    trainer.remove_callback(callback)


_MONITOR: Part[tuple[Monitor, Any]] = Part("watching memory", _end, instead="its last lines are missing")


def _callback(monitor: Monitor) -> Any:
    from transformers import TrainerCallback

    class MemoryMonitor(TrainerCallback):
        """Keeps no state in checkpoints, and changes no control flow."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            monitor.guarded(monitor.train_begin)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            monitor.guarded(monitor.step_begin)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            monitor.guarded(monitor.step_end, state.global_step)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            monitor.guarded(monitor.disturbed)

        def on_save(self, *_: Any, **__: Any) -> None:
            monitor.guarded(monitor.disturbed)

        def on_log(self, *_: Any, **__: Any) -> None:
            monitor.guarded(monitor.logged)

    return MemoryMonitor()
