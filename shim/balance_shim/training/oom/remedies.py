"""The remedies that would have fitted: another map, and settings with their predicted peaks."""

import json
import os
from dataclasses import replace

from ... import map_file, state
from ...language.message import Joined, Message
from ...memory.workload import Workload
from ...monitoring.files import folder_for, free_name
from ...placement.plan import Plan
from ...placement.remedies import Remedy, remedies_that_fit
from ...units import format_alike
from ...upstream.trainer import TrainerLike
from .scene import Scene, had_room

MOST_REMEDIES = 4
FIT_FILE = "device_map_that_fits"


def what_fits(scene: Scene, trainer: TrainerLike) -> list[str]:
    if scene.request is None:
        return []
    lines: list[str] = []
    remedies: list[tuple[str, Plan]] = []
    if scene.kept is not None:
        return [Message("remedy: release them (detach() tensors kept for logging, or keep numbers with item())")]
    if had_room(scene):
        assert scene.better is not None
        room = _names_with_room(scene)
        subject = Message("map") if scene.planned is None or scene.planned.is_users else Message("plan")
        if room:
            line = Message("{devices} had room: the {what} was wrong", devices=Joined(", ", room), what=subject)
        else:
            line = Message("The {what} was wrong", what=subject)
        lines.append(line)
        remedies.append((_written(scene, trainer), scene.better))
    if scene.better is not None:
        workload = scene.better.workload
        changed = remedies_that_fit(scene.better, scene.request)
        scaled = [(_setting(remedy, workload), as_measured(scene, remedy.plan)) for remedy in changed]
        remedies += [(setting, plan) for setting, plan in scaled if not plan.shortfall]
    for number, (setting, plan) in enumerate(remedies[:MOST_REMEDIES], 1):
        worst = plan.worst
        needed, capacity = format_alike(worst.predicted_peak, worst.capacity)
        lines.append(
            Message(
                "remedy {number}: {setting} (predicted {needed} of {capacity} on {device})",
                number=number,
                setting=setting,
                needed=needed,
                capacity=capacity,
                device=worst.name,
            )
        )
    if scene.planned is not None and trainer.args.world_size > 1:
        # This rank knows its own share of the devices only.
        number = 1 + min(len(remedies), MOST_REMEDIES)
        lines.append(Message("remedy {number}: fewer replicas, each on more devices (not predicted)", number=number))
    return lines or [Message("no setting of the shim would have fit; use more or larger devices, or a smaller model")]


def as_measured(scene: Scene, plan: Plan) -> Plan:
    """Return `plan` with all but weights scaled by the ratio of their measured to their predicted bytes.

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


def _names_with_room(scene: Scene) -> list[str]:
    return [
        name
        for position, name in enumerate(scene.meter.names)
        if position != scene.failed
        and scene.peak(position) + (scene.readings[position].others or 0) < 0.8 * scene.meter.totals[position]
    ]


def _written(scene: Scene, trainer: TrainerLike) -> str:
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
        return Message(
            "{value}, as device_map= in the script (it gives none that BALANCE_INTERCEPT replaces)", value=value
        )
    return f"BALANCE_DEVICE_MAP={value}"


def _setting(remedy: Remedy, workload: Workload) -> str:
    """Return a remedy as a setting: a variable where there is one, else words for the script."""
    parts: list[str] = []
    for field, value in remedy.changes.items():
        if field == "gradient_checkpointing":
            parts.append("BALANCE_GRADIENT_CHECKPOINTING=1")
        elif field == "batch_size":
            parts.append(f"BALANCE_MICRO_BATCH={value}")
        elif field == "accumulation":
            continue  # a smaller micro-batch brings it along
        elif field == "optimizer":
            parts.append(Message("optim={name} in the script", name=repr(value)))
        elif field == "tuning":
            parts.append(Message("LoRA (PEFT) in the script"))
        elif field == "seq_len":
            parts.append(Message("sequences of at most {number} tokens in the script", number=value))
        else:
            parts.append(remedy.phrase)
    return Joined(" and ", parts) if parts else remedy.phrase
