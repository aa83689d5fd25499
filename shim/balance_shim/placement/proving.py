"""A map is proved before it is used: the model runs under it, on shapes, and the peaks are as predicted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..memory.compose import peak
from ..units import format_size
from .map_file import DeviceMap
from .plan import CostedModel

if TYPE_CHECKING:
    from .planner import Request

LARGEST_ERROR = 0.05  # of a device's peak; beyond that a plan says so
LEAST_ERROR = 64 << 20  # bytes; differences below decide nothing


class CrossesDevices(Exception):
    """Under a map the model would fail, because an operation meets tensors of two devices."""


def check(request: "Request", costed: CostedModel, device_map: DeviceMap, compare: bool = True) -> tuple[str, ...]:
    """Return what a reader of the plan should know of the proof: nothing when all is as predicted.

    With `compare` off the peaks are not looked at, because layers differ in what they recompute, which a trial does
    not reproduce.

    Raises:
        CrossesDevices: the map cannot be used.
    """
    from ..memory.tracing import proof
    from ..memory.tracing.copy import CannotTrace

    if costed.method.startswith("estimated"):  # it says already that this model does not run on shapes
        return ()
    first = request.devices[0].index
    places = {block.name: int(device_map[block.name]) for block in costed.blocks}
    try:
        found = proof.prove(request.model, costed.blocks, costed.workload, places, first, request.trains, request.batch)
    except proof.CrossesDevices as error:
        raise CrossesDevices(str(error)) from error
    except CannotTrace as error:
        return (f"the map was not tried out on shapes: {error}",)
    notes = []
    for device in request.devices if compare else ():
        predicted = _predicted(costed, places, found.blocks, device.index, first)
        seen = found.peaks.get(device.index, 0)
        if abs(predicted - seen) > LARGEST_ERROR * max(seen, 1) and abs(predicted - seen) > LEAST_ERROR:
            notes.append(
                f"{device.name}: tried out on shapes, activations and gradients take {format_size(seen)} where "
                f"{format_size(predicted)} were predicted"
            )
    return tuple(notes)


def _predicted(costed: CostedModel, places: Mapping[str, int], blocks: frozenset[str], device: int, first: int) -> int:
    """Return the predicted peak of the shortened model on `device`, beside weights and optimizer state."""
    costs = [
        cost
        for block, cost in zip(costed.blocks, costed.costs, strict=True)
        if block.name in blocks and places[block.name] == device
    ]
    costs += [costed.first] if device == first else []
    passing = [replace(cost, weights=0, optimizer=0, step=0) for cost in costs]
    there = sum(cost.gradients for cost in passing) if costed.schedule.accumulating else 0
    return peak(passing, costed.schedule) - there
