"""The dry run: a training step on virtual tensors under a device map."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..structure import ModelStructure
from ..training_case import TrainingCase
from . import measure
from .errors import CannotTrace, TakesTooLong, tracing_errors
from .inputs import supposed_batches
from .origins import CrossesDevices

LAYERS_A_DEVICE = 2  # of each list that run on a device; the rest is like them


@dataclass(frozen=True)
class DryRun:
    """The memory of a shortened model under a map.

    Attributes:
        blocks: the names of the blocks that were in the shortened model.
        peaks: device index -> the most bytes that it held besides weights, from forward to backward.
    """

    blocks: frozenset[str]
    peaks: dict[int, int]


def perform(
    case: TrainingCase, device_map: Mapping[str, int], first: int, recomputed: Collection[str] | None = None
) -> DryRun:
    """Run the model under `device_map` with no more than a few layers on each device.

    Args:
        device_map: block name -> device index.
        first: index of the device where inputs arrive.
        recomputed: the names of the layers that recompute their activations; None: as the workload has it.

    Raises:
        CrossesDevices: an operation meets tensors of two devices, so that the map cannot be used.
        CannotTrace: this model fails in a dry run, so the map is not verified.
    """
    places = sorted({first, *device_map.values()}, key=lambda index: (index != first, index))
    with tracing_errors():
        left_out = _left_out(case.structure, device_map, recomputed or ())
        batches = [case.batch] if case.batch is not None else supposed_batches(case.model, case.workload)
        reasons: list[CannotTrace] = []
        for fed, less in product(batches, (left_out, frozenset())):
            try:
                return _run(case, device_map, places, fed, less, recomputed)
            except (CrossesDevices, TakesTooLong):
                raise
            except CannotTrace as error:
                reasons.append(error)
        raise reasons[0]


def _run(
    case: TrainingCase,
    device_map: Mapping[str, int],
    places: Sequence[int],
    fed: Mapping[str, Any],
    left_out: frozenset[str],
    recomputed: Collection[str] | None,
) -> DryRun:
    devices = {block.name: places.index(device_map[block.name]) for block in case.structure.blocks}
    held = measure.run_placed(case, devices, fed, left_out, recomputed).held
    peaks = {place: max(held[index].forward, held[index].backward) for index, place in enumerate(places)}
    return DryRun(frozenset(devices) - left_out, peaks)


def _left_out(structure: ModelStructure, device_map: Mapping[str, int], recomputed: Collection[str]) -> frozenset[str]:
    """Return the layers that other layers of their list and device represent; never those that share weights."""
    shared = structure.sharing_layers
    running: dict[tuple[str, int, bool], int] = {}
    left_out = set()
    for block in structure.blocks:
        parent, _, number = block.name.rpartition(".")
        if block.role not in ("layer", "tower") or not number.isdigit() or block.name in shared:
            continue
        key = parent, device_map[block.name], block.name in recomputed
        running[key] = running.get(key, 0) + 1
        if running[key] > LAYERS_A_DEVICE:
            left_out.add(block.name)
    return frozenset(left_out)
