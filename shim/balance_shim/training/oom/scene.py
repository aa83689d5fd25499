"""The scene of an out-of-memory error: the devices then, and predictions for the micro-batch that was really there.

They are made again on the memory that other processes have left.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ... import devices, map_file, state
from ...device import Device
from ...memory.training_case import TrainingCase
from ...memory.workload import Workload, assume, longest_row
from ...monitoring.diagnosis import Finding
from ...monitoring.out_of_memory import Place
from ...monitoring.readings import Meter, Reading
from ...placement import planner
from ...placement.balance import DoesNotFit
from ...placement.costed_model import CostedModel
from ...placement.places import device_of
from ...placement.plan import Plan, evaluate
from ...placement.request import Request
from ...upstream.trainer import TrainerLike
from .. import precision
from ..actual_workload import tuning

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Scene:
    """The facts of an out-of-memory error: its place, the devices then, the plan, and the plan for the actual batch.

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
        """Return the bytes that a device has needed: on the one that failed, with the allocation that failed."""
        reading = self.readings[position]
        if position != self.failed:
            return reading.peak
        return max(reading.peak, reading.allocated + self.place.wanted)


def with_predictions(scene: Scene, trainer: TrainerLike, model: "nn.Module") -> Scene:
    """Return the scene with the prediction for the micro-batch that failed, under its map and the best one."""
    settings = state.settings()
    own_bytes = {index: reading.allocated for index, reading in zip(scene.meter.indices, scene.readings, strict=True)}
    places = set(scene.meter.indices)
    if scene.planned is not None:
        places = {device.device.index for device in scene.planned.devices}
    usable = devices.inventory(settings, ours=own_bytes, only=places)
    workload = _workload(scene, trainer, model)
    inputs = scene.place.inputs if scene.place.batch.seq_len else None
    case = TrainingCase.of(
        model,
        workload,
        trains=lambda _, parameter: parameter.requires_grad,
        batch=None if inputs is None else {name: _on_host(tensor) for name, tensor in inputs.items()},
    )
    request = Request.from_settings(
        settings,
        case,
        usable,
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


def _workload(scene: Scene, trainer: TrainerLike, model: "nn.Module") -> Workload:
    if scene.planned is not None:
        workload = scene.planned.workload
    else:
        workload = assume(state.settings(), trainer.args, longest_row(model.config))
        workload = replace(workload, tuning=tuning(trainer.model))
    batch = scene.place.batch
    if batch.seq_len:
        workload = replace(workload, batch_size=batch.batch_size, seq_len=batch.seq_len, guessed=False)
    return workload


def _corrected(costed: CostedModel, actual: Plan, scene: Scene) -> CostedModel:
    """Return the costs with the gap between prediction and measurement spread over the blocks of the device.

    Weights are known exactly, so it is put to what the blocks keep for the backward pass.
    """
    gap = beyond_prediction(replace(scene, actual=actual))
    index = scene.meter.indices[scene.failed]
    on_it = [
        position for position, block in enumerate(costed.blocks) if device_of(block.name, actual.device_map) == index
    ]
    if gap <= 0 or not on_it:
        return costed
    share = -(-gap // len(on_it))
    costs = list(costed.costs)
    for position in on_it:
        costs[position] = costs[position].with_more(kept=share, passing=share)
    return replace(costed, costs=tuple(costs), records=(), first_record=None)  # of other costs than these


def _map_of(model: "nn.Module", usable: tuple[Device, ...]) -> map_file.DeviceMap | None:
    """Return the map of a model that the shim has not placed, which accelerate keeps; else that of its one device."""
    others_map: Any = getattr(model, "hf_device_map", None)
    if not others_map:
        place = next(model.parameters()).device.index
        return None if place is None else {"": place}
    usable_indices = {device.index for device in usable}
    device_map: map_file.DeviceMap = {}
    for name, place in others_map.items():
        index = place if isinstance(place, int | str) else getattr(place, "index", None)
        if index not in usable_indices and index not in map_file.OFFLOADED:
            return None
        device_map[name] = index
    return device_map


def _on_host(value: Any) -> Any:
    return value.cpu() if hasattr(value, "cpu") else value


def beyond_prediction(scene: Scene) -> int:
    """Return the bytes measured beyond the prediction for this batch on the device that failed."""
    index = scene.meter.indices[scene.failed]
    predicted = None if scene.actual is None else scene.actual.on(index)
    return 0 if predicted is None else scene.peak(scene.failed) - predicted.predicted_peak


def had_room(scene: Scene) -> bool:
    """Whether another map would have held this batch: then the devices had room, and the map was wrong."""
    better, actual = scene.better, scene.actual
    if better is None or better.shortfall or scene.kept is not None:  # what grows fills any map
        return False
    return actual is None or any(
        device_of(name, actual.device_map) != place for name, place in better.device_map.items()
    )
