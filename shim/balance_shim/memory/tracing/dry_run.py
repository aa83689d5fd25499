"""The dry run: a training step on virtual tensors under a device map."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from ..blocks import Block
from ..workload import Workload
from . import layers, measure
from .errors import CannotTrace, TakesTooLong, tracing_errors
from .inputs import supposed_batches
from .model_copy import Trains
from .origins import CrossesDevices

LAYERS_A_DEVICE = 2  # of each list that run on a device; the rest is like them


@dataclass(frozen=True)
class DryRun:
    """What a shortened model held under a map.

    Attributes:
        blocks: the names of the blocks that were in the shortened model.
        peaks: device index -> the most bytes that it held beside weights, from forward to backward.
    """

    blocks: frozenset[str]
    peaks: dict[int, int]


def perform(
    model: nn.Module,
    blocks: Sequence[Block],
    workload: Workload,
    device_map: Mapping[str, int],
    first: int,
    trains: Trains = None,
    real_batch: Mapping[str, Any] | None = None,
    recomputed: Collection[str] | None = None,
) -> DryRun:
    """Run the model under `device_map` with no more than a few layers on each device.

    Args:
        device_map: block name -> device index.
        first: index of the device where inputs arrive.
        recomputed: the names of the layers that recompute their activations; None: as the workload says.

    Raises:
        CrossesDevices: an operation meets tensors of two devices, so that the map cannot be used.
        CannotTrace: this model fails in a dry run, so nothing is proved.
    """
    places = sorted({first, *device_map.values()}, key=lambda index: (index != first, index))
    with tracing_errors():
        left_out = _left_out(blocks, device_map, layers.sharing(model, blocks), recomputed or ())
        batches = [real_batch] if real_batch is not None else supposed_batches(model, workload)
        reasons: list[CannotTrace] = []
        for fed, less in product(batches, (left_out, frozenset())):
            try:
                return _run(model, blocks, workload, device_map, places, trains, fed, less, recomputed)
            except (CrossesDevices, TakesTooLong):
                raise
            except CannotTrace as error:
                reasons.append(error)
        raise reasons[0]


def _run(
    model: nn.Module,
    blocks: Sequence[Block],
    workload: Workload,
    device_map: Mapping[str, int],
    places: Sequence[int],
    trains: Trains,
    fed: Mapping[str, Any],
    left_out: frozenset[str],
    recomputed: Collection[str] | None,
) -> DryRun:
    devices = {block.name: places.index(device_map[block.name]) for block in blocks}
    held = measure.run_placed(model, blocks, devices, workload, trains, fed, left_out, recomputed).held
    peaks = {place: max(held[index].forward, held[index].backward) for index, place in enumerate(places)}
    return DryRun(frozenset(devices) - left_out, peaks)


def _left_out(
    blocks: Sequence[Block], device_map: Mapping[str, int], shared: frozenset[str], recomputed: Collection[str]
) -> frozenset[str]:
    """Return the layers that others of their list and device speak for; never those that share weights."""
    kept: dict[tuple[str, int, bool], int] = {}
    left_out = set()
    for block in blocks:
        parent, _, number = block.name.rpartition(".")
        if block.role not in ("layer", "tower") or not number.isdigit() or block.name in shared:
            continue
        key = parent, device_map[block.name], block.name in recomputed
        kept[key] = kept.get(key, 0) + 1
        if kept[key] > LAYERS_A_DEVICE:
            left_out.add(block.name)
    return frozenset(left_out)
