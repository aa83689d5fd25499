"""Explain an out-of-memory error: its place, predicted and measured peaks, a map that would have fitted, remedies."""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ... import devices, log, state
from ...language.message import Message
from ...language.speaker import Say, english, language_of, speaker
from ...monitoring import trainer_callback
from ...monitoring.monitor import watched_devices
from ...monitoring.other_processes import paged_state
from ...monitoring.out_of_memory import place_of
from ...monitoring.readings import Meter
from ...patching.guard import attempt
from ...placement.plan import Plan
from ...report import plan_report
from ...report.table import table
from ...units import format_alike, format_size
from ...upstream.trainer import TrainerLike
from ..actual_workload import innermost
from .causes import causes
from .remedies import what_fits
from .scene import Scene, with_predictions

if TYPE_CHECKING:
    from torch import nn

HEADER = ("device", "as planned", "for this batch", "measured", "others", "of")


def explain(trainer: TrainerLike, model: "nn.Module", plan: Plan | None, failure: BaseException) -> None:
    """Say on standard error why `failure`, an out-of-memory error, was raised while `trainer` trained.

    Args:
        trainer: a `transformers.Trainer`.
        model: what was placed: the trainer's model, or one inside of it.
        plan: the plan that placed it, or None.
        failure: as it was raised; it is only read.
    """
    kind = devices.accelerator_type()
    alone = trainer.args.world_size == 1
    if kind is None or (alone and not log.is_first_process()):
        return
    if plan is None:
        model = innermost(model)  # a map has the names of the model inside
    place = place_of(failure, model)
    meter = Meter(kind, _looked_at(trainer, plan, kind))
    meter.paged = paged_state(getattr(trainer, "optimizer", None))
    readings = meter.read()
    # Without a number in the message it is the device with the least room.
    rooms = [
        total - reading.allocated - (reading.others or 0) for total, reading in zip(meter.totals, readings, strict=True)
    ]
    failed = rooms.index(min(rooms))
    if place.device is not None and place.device in meter.indices:
        failed = meter.indices.index(place.device)
    monitor = trainer_callback.monitor_of(trainer)
    scene = Scene(place, meter, readings, failed, plan)
    if monitor is not None:
        scene = replace(scene, largest_before=monitor.largest, kept=monitor.kept)
    planned_again = "the explanation of the out-of-memory has no map and no remedies"
    scene = attempt("planning again", with_predictions, scene, trainer, model, default=scene, instead=planned_again)
    headline, reasons, rows = _headline(scene, trainer), causes(scene), _rows(scene)
    remedies = attempt("looking for what fits", what_fits, scene, trainer, default=[], instead=planned_again)

    def in_words(say: Say) -> str:
        aligned = table([say(heading) for heading in HEADER], rows).replace("\n", "\n  ")
        return "\n  ".join(map(say, [headline, *reasons, aligned, *remedies]))

    facts = {
        "step": trainer.state.global_step + 1,
        "device": scene.name,
        "headline": headline,
        "causes": reasons,
        "table": [list(HEADER), *rows],
        "remedies": remedies,
    }
    report = log.error if alone else log.error_of_any_rank
    say = speaker(language_of(os.environ, state.settings().lang), sys.stderr)
    report(in_words(english), "out of memory", facts, shown=in_words(say))


def _looked_at(trainer: TrainerLike, plan: Plan | None, kind: str) -> list[int]:
    """Return the devices to look at: those that the training uses and, of a model of nobody's plan, those in reach.

    A question to any other would make a context on it, which takes memory where somebody else may need it.
    """
    used = watched_devices(trainer, plan)
    indices = set(used[1]) if used is not None else set()
    if plan is None and trainer.args.world_size == 1:
        indices |= set(devices.in_use(kind))
    return sorted(indices) or [0]


def _headline(scene: Scene, trainer: TrainerLike) -> str:
    place = scene.place
    block = _block_of(place.module, scene)
    location = Message(" of {module}", module=place.module) if place.module else ""
    if place.phase == "backward pass" and place.module:
        location = Message(", recomputing {module}", module=place.module)
    elif place.phase in ("backward pass", "optimizer step"):
        location = Message(" ({blocks})", blocks=_on_device(scene))
    inside = Message(" (block {name})", name=block) if block and block != place.module else ""
    sizes = (scene.readings[scene.failed].allocated, place.wanted, scene.meter.totals[scene.failed])
    allocated, requested, total = format_alike(*sizes)
    size = f"{place.batch.batch_size} x {place.batch.seq_len}"
    return Message(
        "out of memory on {device} in the {phase}{where}{inside}, step {step}{batch}: {allocated} in tensors{wanted}, "
        "of {total}",
        device=scene.name,
        phase=place.phase,
        where=location,
        inside=inside,
        step=trainer.state.global_step + 1,
        batch=Message(", batch of {size} tokens", size=size) if place.batch.tokens else "",
        allocated=allocated,
        wanted=Message(", {size} more requested", size=requested) if place.wanted else "",
        total=total,
    )


def _block_of(module: str, scene: Scene) -> str:
    plan = scene.planned or scene.actual
    if plan is None or not module:
        return ""
    return next((name for name in plan.device_map if name and f"{module}.".startswith(f"{name}.")), "")


def _on_device(scene: Scene) -> str:
    plan = scene.planned or scene.actual
    if plan is None:
        return Message("block unknown: autograd and optimizers do not report it")
    held = plan_report.summary(plan.device_map, scene.meter.indices[scene.failed])
    return Message(
        "the traceback does not name the block; blocks of {device}: {blocks}", device=scene.name, blocks=held
    )


def _rows(scene: Scene) -> list[list[str]]:
    """Return the rows under `HEADER`, one for each device."""
    plan = scene.planned
    planned = {} if plan is None else {device_plan.device.index: device_plan for device_plan in plan.devices}
    actual = (
        {} if scene.actual is None else {device_plan.device.index: device_plan for device_plan in scene.actual.devices}
    )
    rows = []
    for position, (index, name) in enumerate(zip(scene.meter.indices, scene.meter.names, strict=True)):
        if scene.request is not None and index not in actual and index not in planned:
            continue
        reading = scene.readings[position]
        rows.append(
            [
                name + (" <-" if position == scene.failed else ""),
                format_size(planned[index].predicted_peak) if index in planned else "",
                format_size(actual[index].predicted_peak) if index in actual else "",
                format_size(scene.peak(position)),
                format_size(reading.others or 0),
                format_size(scene.meter.totals[position]),
            ]
        )
    return rows
