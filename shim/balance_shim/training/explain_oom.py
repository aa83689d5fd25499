"""Explain an out-of-memory error: its place, predicted and measured peaks, a map that would have fitted, remedies.

The predictions are made again for the micro-batch that was really there, on the memory that others have left.
"""

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from .. import devices, log, map_file, state
from ..devices import Device
from ..memory.workload import Workload, assume, longest_row
from ..monitoring import trainer_callback
from ..monitoring.diagnosis import LONG_BATCH, Finding
from ..monitoring.files import folder_for, free_name
from ..monitoring.monitor import watched_devices
from ..monitoring.other_processes import paged_state
from ..monitoring.out_of_memory import Place, place_of
from ..monitoring.readings import Meter, Reading
from ..patching.guard import attempt
from ..placement import planner
from ..placement.balance import DoesNotFit
from ..placement.plan import CostedModel, Plan, device_of, evaluate
from ..placement.remedies import Remedy, remedies_that_fit
from ..placement.request import Request
from ..report import plan_report
from ..report.table import table
from ..units import format_alike, format_size
from . import precision
from .actual_workload import innermost, tuning

MOST_REMEDIES = 4
HELD_BY_OTHERS = 0.1  # of a device: what is worth a line
UNUSED = 0.1
UNEXPLAINED = 0.1
FIT_FILE = "device_map_that_fits"


@dataclass(frozen=True)
class _Scene:
    """All that is known: where it happened, the devices then, and what was and should have been planned.

    Attributes:
        planned: the plan in force; None where the shim has placed nothing.
        actual: the same map for the micro-batch that was there.
        better: the best map for it; None where even the weights do not fit.
        largest_before: elements of the largest micro-batch of earlier steps; 0 where nobody has watched.
        kept: what was found to be kept from step to step.
        request: what was planned again.
    """

    place: Place
    meter: Meter
    readings: tuple[Reading, ...]
    failed: int  # position in the meter's devices
    planned: Plan | None
    actual: Plan | None = None
    better: Plan | None = None
    largest_before: int = 0
    kept: Finding | None = None
    request: Request | None = None

    @property
    def name(self) -> str:
        return self.meter.names[self.failed]

    def peak(self, position: int) -> int:
        """Return what a device has needed: on the one that failed, with what it was asked for in vain."""
        reading = self.readings[position]
        if position != self.failed:
            return reading.peak
        return max(reading.peak, reading.allocated + self.place.wanted)


def explain(trainer: Any, model: Any, plan: Plan | None, failure: BaseException, loss_on_first: bool) -> None:
    """Say on standard error why `failure`, an out-of-memory error, was raised while `trainer` trained.

    Args:
        trainer: a `transformers.Trainer`.
        model: what was placed: the trainer's model, or one inside of it.
        plan: the plan that placed it, or None.
        failure: as it was raised; it is only read.
        loss_on_first: as in `Request`.
    """
    kind = devices.accelerator_type()
    if kind is None or not log.is_first_process():
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
    scene = _Scene(place, meter, readings, failed, plan)
    if monitor is not None:
        scene = replace(scene, largest_before=monitor.largest, kept=monitor.kept)
    planned_again = "the explanation of the out-of-memory has no map and no remedies"
    scene = attempt(
        "planning again", _planned, scene, trainer, model, loss_on_first, default=scene, instead=planned_again
    )
    lines = [_headline(scene, trainer), *_causes(scene), _table(scene)]
    lines += attempt("looking for what fits", _what_fits, scene, trainer, default=[], instead=planned_again)
    log.error("\n  ".join(lines))


def _looked_at(trainer: Any, plan: Plan | None, kind: str) -> list[int]:
    """Return the devices to look at: those that the training uses and, of a model of nobody's plan, those in reach.

    A question to any other would make a context on it, which takes memory where somebody else may need it.
    """
    used = watched_devices(trainer, plan)
    indices = set(used[1]) if used is not None else set()
    if plan is None and trainer.args.world_size == 1:
        indices |= set(devices.in_use(kind))
    return sorted(indices) or [0]


def _planned(scene: _Scene, trainer: Any, model: Any, loss_on_first: bool) -> _Scene:
    """Return the scene with what is predicted for the micro-batch that was there, under its map and the best one."""
    settings = state.settings()
    ours = {index: reading.allocated for index, reading in zip(scene.meter.indices, scene.readings, strict=True)}
    places = set(scene.meter.indices)
    if scene.planned is not None:
        places = {device.device.index for device in scene.planned.devices}
    usable = devices.inventory(settings, ours=ours, only=places)
    workload = _workload(scene, trainer, model)
    inputs = scene.place.inputs if scene.place.batch.row_tokens else None
    request = Request.from_settings(
        settings,
        model,
        workload,
        usable,
        trains=lambda _, parameter: parameter.requires_grad,
        batch=None if inputs is None else {name: _on_host(each) for name, each in inputs.items()},
        loss_on_first=loss_on_first,
        selective=scene.planned is not None and scene.planned.recomputed is not None,
        may_halve=precision.could_halve(),
    )
    costed, recomputed = planner.costed_for(request)
    device_map = scene.planned.device_map if scene.planned is not None else _map_of(model, usable)
    actual = None if device_map is None else evaluate("map", costed, device_map, usable)
    if actual is not None and scene.kept is None:
        costed = _corrected(costed, actual, scene)
    try:
        better = planner.solved(request, costed, recomputed)
    except DoesNotFit:
        better = None
    return replace(scene, actual=actual, better=better, request=request)


def _workload(scene: _Scene, trainer: Any, model: Any) -> Workload:
    if scene.planned is not None:
        workload = scene.planned.workload
    else:
        workload = assume(state.settings(), trainer.args, longest_row(model.config))
        workload = replace(workload, tuning=tuning(trainer.model))
    batch = scene.place.batch
    if batch.row_tokens:
        workload = replace(workload, batch_size=batch.rows, seq_len=batch.row_tokens, guessed=False)
    return workload


def _corrected(costed: CostedModel, actual: Plan, scene: _Scene) -> CostedModel:
    """Return the costs with the gap between prediction and measurement spread over the blocks of the device.

    Weights are known exactly, so it is put to what the blocks keep for the backward pass.
    """
    gap = _beyond_prediction(replace(scene, actual=actual))
    index = scene.meter.indices[scene.failed]
    on_it = [
        position for position, block in enumerate(costed.blocks) if device_of(block.name, actual.device_map) == index
    ]
    if gap <= 0 or not on_it:
        return costed
    share = -(-gap // len(on_it))
    costs = list(costed.costs)
    for position in on_it:
        cost = costs[position]
        costs[position] = replace(
            cost,
            activations=cost.activations + share,
            forward=cost.forward + share,
            backward=cost.backward + share,
        )
    return replace(costed, costs=tuple(costs), records=(), first_record=None)  # of other costs than these


def _map_of(model: Any, usable: tuple[Device, ...]) -> map_file.DeviceMap | None:
    """Return the map that somebody else has given `model`: accelerate keeps it; else it is all on one device."""
    found = getattr(model, "hf_device_map", None)
    if not found:
        place = next(model.parameters()).device.index
        return None if place is None else {"": place}
    known = {device.index for device in usable}
    device_map: map_file.DeviceMap = {}
    for name, place in found.items():
        index = place if isinstance(place, int | str) else getattr(place, "index", None)
        if index not in known and index not in map_file.OFFLOADED:
            return None
        device_map[name] = index
    return device_map


def _on_host(value: Any) -> Any:
    return value.cpu() if hasattr(value, "cpu") else value


def _headline(scene: _Scene, trainer: Any) -> str:
    place = scene.place
    block = _block_of(place.module, scene)
    where = f" of {place.module}" if place.module else ""
    if place.phase == "backward pass":
        where = f", recomputing {place.module}" if place.module else f" ({_on_device(scene)})"
    elif place.phase == "optimizer step":
        where = f" ({_on_device(scene)})"
    inside = f" (block {block})" if block and block != place.module else ""
    sizes = (scene.readings[scene.failed].allocated, place.wanted, scene.meter.totals[scene.failed])
    allocated, asked, total = format_alike(*sizes)
    wanted = f", {asked} more requested" if place.wanted else ""
    batch = f", batch of {place.batch.rows} x {place.batch.row_tokens} tokens" if place.batch.tokens else ""
    step = f", step {trainer.state.global_step + 1}"
    return (
        f"out of memory on {scene.name} in the {place.phase}{where}{inside}{step}{batch}: "
        f"{allocated} in tensors{wanted}, of {total}"
    )


def _block_of(module: str, scene: _Scene) -> str:
    plan = scene.planned or scene.actual
    if plan is None or not module:
        return ""
    return next((name for name in plan.device_map if name and f"{module}.".startswith(f"{name}.")), "")


def _on_device(scene: _Scene) -> str:
    plan = scene.planned or scene.actual
    if plan is None:
        return "block unknown: autograd and optimizers do not report it"
    held = plan_report.summary(plan.device_map, scene.meter.indices[scene.failed])
    return f"the traceback does not name the block; blocks of {scene.name}: {held}"


def _causes(scene: _Scene) -> list[str]:
    """Return what is to be seen to have gone another way than planned, a line each."""
    found = []
    reading, total = scene.readings[scene.failed], scene.meter.totals[scene.failed]
    if reading.others and reading.others >= HELD_BY_OTHERS * total:
        found.append(
            f"cause: other processes use {format_size(reading.others)} of the {format_size(total)} of {scene.name}"
        )
    paged = scene.meter.paged.get(scene.meter.indices[scene.failed], 0)
    if paged >= HELD_BY_OTHERS * total:
        found.append(
            f"cause: up to {format_size(paged)} of {scene.name} are paged optimizer state, which torch does not count"
        )
    batch = scene.place.batch
    if scene.planned is not None and batch.row_tokens:
        planned = scene.planned.workload
        if batch.tokens > planned.tokens:
            found.append(
                f"cause: this micro-batch has {batch.rows} x {batch.row_tokens} tokens, the plan was for "
                f"{planned.batch_size} x {planned.seq_len}{', assumed' if planned.guessed else ''}"
            )
    if scene.largest_before and batch.elements >= LONG_BATCH * scene.largest_before:
        times = batch.elements / scene.largest_before
        found.append(f"cause: this micro-batch is {times:.1f} times as large as any before")
    unused = reading.reserved - reading.allocated
    if unused >= UNUSED * total:
        found.append(
            f"cause: {format_size(unused)} of {scene.name} are reserved by the allocator and cannot be used "
            "(fragmentation); PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9) "
            "usually ends that"
        )
    if scene.kept is not None:
        found.append(
            f"cause: tensors have been retained since step {scene.kept.step}, "
            f"{format_size(scene.kept.rate)} per step; their owner is named above"
        )
    elif scene.planned is not None and scene.planned.is_users and _had_room(scene):
        found.append("cause: the map that was given is wrong for this training; see below")
    beyond = _beyond_prediction(scene)
    if not found and beyond >= UNEXPLAINED * total:
        found.append(
            f"cause: unknown; {format_size(beyond)} more than predicted is in use on {scene.name}. "
            "BALANCE_MONITOR=1 shows what grows from step to step"
        )
    return found


def _beyond_prediction(scene: _Scene) -> int:
    """Return the bytes measured beyond what is predicted for this batch on the device that failed."""
    index = scene.meter.indices[scene.failed]
    predicted = None if scene.actual is None else scene.actual.on(index)
    return 0 if predicted is None else scene.peak(scene.failed) - predicted.predicted_peak


def _as_measured(scene: _Scene, plan: Plan) -> Plan:
    """Return `plan` with all but weights scaled by what was measured of them against what was predicted.

    A remedy is no remedy if it holds only by the figures that have just turned out too low.
    """
    index = scene.meter.indices[scene.failed]
    predicted = None if scene.actual is None else scene.actual.on(index)
    if predicted is None or scene.kept is not None:
        return plan
    fixed = predicted.terms["weights"] + predicted.terms["overhead"]
    factor = (scene.peak(scene.failed) - fixed) / max(1, predicted.predicted_peak - fixed)
    if factor <= 1:
        return plan
    scaled = []
    for device in plan.devices:
        terms = {
            term: size if term in ("weights", "overhead") else int(size * factor) for term, size in device.terms.items()
        }
        scaled.append(replace(device, terms=terms))
    return replace(plan, devices=tuple(scaled))


def _table(scene: _Scene) -> str:
    plan = scene.planned
    planned = {} if plan is None else {each.device.index: each for each in plan.devices}
    actual = {} if scene.actual is None else {each.device.index: each for each in scene.actual.devices}
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
    header = ["device", "as planned", "for this batch", "measured", "others", "of"]
    return table(header, rows).removeprefix("  ").replace("\n", "\n  ")


def _had_room(scene: _Scene) -> bool:
    """Whether another map would have held this batch: then the devices had room, and the map was wrong."""
    better, actual = scene.better, scene.actual
    if better is None or better.shortfall or scene.kept is not None:  # what grows fills any map
        return False
    return actual is None or any(
        device_of(name, actual.device_map) != place for name, place in better.device_map.items()
    )


def _what_fits(scene: _Scene, trainer: Any) -> list[str]:
    if scene.request is None:
        return []
    lines, remedies = [], []
    if scene.kept is not None:
        return ["remedy: release them (detach() tensors kept for logging, or keep numbers with item())"]
    if _had_room(scene):
        assert scene.better is not None
        room = _names_with_room(scene)
        had = f"{', '.join(room)} had room: the" if room else "The"
        lines.append(f"{had} {'map' if scene.planned is None or scene.planned.is_users else 'plan'} was wrong")
        remedies.append((_written(scene, trainer), scene.better))
    if scene.better is not None:
        workload = scene.better.workload
        changed = remedies_that_fit(scene.better, scene.request)
        scaled = [(_setting(remedy, workload), _as_measured(scene, remedy.plan)) for remedy in changed]
        remedies += [(setting, plan) for setting, plan in scaled if not plan.shortfall]
    for number, (setting, plan) in enumerate(remedies[:MOST_REMEDIES], 1):
        worst = plan.worst
        needed, capacity = format_alike(worst.predicted_peak, worst.capacity)
        predicted = f"{needed} of {capacity} on {worst.name}"
        lines.append(f"remedy {number}: {setting} (predicted {predicted})")
    return lines or ["no setting of the shim would have fit; use more or larger devices, or a smaller model"]


def _names_with_room(scene: _Scene) -> list[str]:
    return [
        name
        for position, name in enumerate(scene.meter.names)
        if position != scene.failed
        and scene.peak(position) + (scene.readings[position].others or 0) < 0.8 * scene.meter.totals[position]
    ]


def _written(scene: _Scene, trainer: Any) -> str:
    """Write the map that fits to a file, and return how to use it."""
    assert scene.better is not None
    folder = folder_for(state.settings().report, trainer.args.output_dir)
    try:
        os.makedirs(folder, exist_ok=True)
        path = free_name(folder, FIT_FILE, "json")
        map_file.write(scene.better.device_map, path)
        value = path
    except OSError:  # nowhere to write: then in full
        value = json.dumps(scene.better.device_map)
    if scene.planned is None:
        return f"{value}, as device_map= in the script (it gives none that BALANCE_INTERCEPT replaces)"
    return f"BALANCE_DEVICE_MAP={value}"


def _setting(remedy: Remedy, workload: Workload) -> str:
    """Return a remedy as what to set: a variable where there is one, else words for the script."""
    parts = []
    for field, value in remedy.changes.items():
        if field == "gradient_checkpointing":
            parts.append("BALANCE_GRADIENT_CHECKPOINTING=1")
        elif field == "batch_size":
            parts.append(f"BALANCE_MICRO_BATCH={value}")
        elif field == "accumulation":
            continue  # a smaller micro-batch brings it along
        elif field == "optimizer":
            parts.append(f"optim={value!r} in the script")
        elif field == "tuning":
            parts.append("LoRA (PEFT) in the script")
        elif field == "seq_len":
            parts.append(f"sequences of at most {value} tokens in the script")
        else:
            parts.append(remedy.phrase)
    return " and ".join(parts) or remedy.phrase
