"""Verify a map before use: a dry run under it, whose peaks are compared with the prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..cache import cached
from ..device import Device
from ..language.message import Message
from ..map_file import DeviceMap
from ..memory.cost import BlockCost
from ..memory.peak import peak
from ..units import format_alike
from .costed_model import CostedModel

if TYPE_CHECKING:
    from .request import Request

LARGEST_ERROR = 0.05  # of a device's peak; beyond that a plan has a note
LEAST_ERROR = 64 << 20  # bytes; differences below decide nothing


@dataclass(frozen=True)
class Verification:
    """The result of a dry run under a map, of a model shortened to a few layers a device.

    Attributes:
        peaks: device index -> the most bytes that it held besides weights and optimizer state.
        blocks: the names of the blocks that ran.
        met: for each operation that met tensors on two devices the blocks that they come from, None among them for the
            inputs: the map cannot be used. Empty otherwise.
        failure: why the model fails in a dry run, so that nothing is known; "" otherwise.
    """

    peaks: Mapping[int, int] = field(default_factory=dict)
    blocks: frozenset[str] = frozenset()
    met: tuple[frozenset[str | None], ...] = ()
    failure: str = ""


def verify(
    request: "Request", costed: CostedModel, device_map: DeviceMap, recomputed: frozenset[str] | None = None
) -> Verification:
    """Return the verification of `device_map`, made once for a model, a map and the layers to recompute."""
    if costed.source == "formula after time-out":
        return Verification(failure=costed.method)
    request = request.in_training()
    costed = replace(costed, workload=replace(costed.workload, evaluation=None))
    key = request.key("dry run", device_map, request.devices[0].index, sorted(recomputed or ()))
    content = cached(request.cache, key, lambda: _tried(request, costed, device_map, recomputed))
    return Verification(
        {int(index): size for index, size in content["peaks"].items()},
        frozenset(content["blocks"]),
        tuple(map(frozenset, content["met"])),
        content["failure"],
    )


def _tried(
    request: "Request", costed: CostedModel, device_map: DeviceMap, recomputed: frozenset[str] | None
) -> dict[str, Any]:
    from ..memory.tracing import dry_run, too_long
    from ..memory.tracing.errors import CannotTrace, TakesTooLong
    from ..memory.tracing.machine import tracing_for
    from ..memory.tracing.origins import CrossesDevices

    result: dict[str, Any] = {"peaks": {}, "blocks": [], "met": [], "failure": ""}
    if too_long.is_known(request.model, "dry run", costed.workload.seq_len):
        return {**result, "failure": f"{costed.structure.model_class} took too long in an earlier dry run"}
    places = {block.name: int(device_map[block.name]) for block in costed.blocks}
    first = request.devices[0].index
    try:
        with tracing_for(request.architectures, request.repeats_grouped_keys):
            case = replace(request.case, workload=costed.workload)
            run = dry_run.perform(case, places, first, recomputed)
    except CrossesDevices as error:
        return {**result, "met": [sorted(blocks, key=str) for blocks in error.met]}
    except CannotTrace as error:
        if isinstance(error, TakesTooLong):
            too_long.note(request.model, "dry run", costed.workload.seq_len)
        return {**result, "failure": str(error)}
    return {
        **result,
        "peaks": {str(index): size for index, size in run.peaks.items()},
        "blocks": sorted(run.blocks),
    }


@dataclass(frozen=True)
class Misprediction:
    """A device whose peak besides weights and optimizer state, in bytes, was not as predicted."""

    device: Device
    predicted: int
    seen: int

    def describe(self) -> str:
        """Return a line for people."""
        seen, predicted = format_alike(self.seen, self.predicted)
        return Message(
            "{device}: in a dry run activations and gradients take {seen}, where {predicted} was predicted",
            device=self.device.name,
            seen=seen,
            predicted=predicted,
        )


def mispredictions(
    verified: Verification, costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]
) -> tuple[Misprediction, ...]:
    """Return the devices of the dry run whose peaks differ from those that `costed` predicts."""
    off: list[Misprediction] = []
    if costed.source == "blockwise trace":  # with pictures, which the model as a whole is tried out without
        return ()
    for device in devices if verified.blocks else ():
        predicted = _peak_without_state(costed, _ran_on(device, verified, costed, device_map, devices[0]))
        measured = verified.peaks.get(device.index, 0)
        if abs(predicted - measured) > max(LARGEST_ERROR * measured, LEAST_ERROR):
            off.append(Misprediction(device, predicted, measured))
    return tuple(off)


def corrected(
    verified: Verification,
    costed: CostedModel,
    device_map: DeviceMap,
    first_device: Device,
    misprediction: Misprediction,
) -> CostedModel:
    """Return `costed` with the bytes beyond a device's prediction added as temporaries of one of its blocks.

    Of one that is no layer, if there is any: layers are alike, so one of them would be off everywhere.
    """
    costs = _ran_on(misprediction.device, verified, costed, device_map, first_device)
    roles = {block.name: block.role for block in costed.blocks}
    guilty = max(costs, key=lambda name: (roles.get(name) != "layer", max(costs[name].forward, costs[name].backward)))
    # Raised by more than enough, the block sets the peak itself; the rest of that peak tells by how much to raise it.
    enough = _peak_without_state(costed, {**costs, guilty: _raised(costs[guilty], _MUCH)}) - _MUCH
    raised = _raised(costs[guilty], misprediction.seen - enough)
    if guilty == _ARRIVING:
        return replace(costed, first=raised)
    pairs = zip(costed.blocks, costed.costs, strict=True)
    return replace(costed, costs=tuple(raised if block.name == guilty else cost for block, cost in pairs))


_MUCH = 1 << 60
_ARRIVING = "inputs and outputs"  # beside the names of blocks, which have no spaces


def _raised(cost: BlockCost, by: int) -> BlockCost:
    return cost.with_more(passing=by)


def _ran_on(
    device: Device, verified: Verification, costed: CostedModel, device_map: DeviceMap, first_device: Device
) -> dict[str, BlockCost]:
    """Return the costs of the blocks that ran on `device`, in forward order."""
    costs = {
        block.name: cost
        for block, cost in zip(costed.blocks, costed.costs, strict=True)
        if block.name in verified.blocks and device_map[block.name] == device.index
    }
    return {**costs, _ARRIVING: costed.first} if device == first_device else costs


def _peak_without_state(costed: CostedModel, costs: Mapping[str, BlockCost]) -> int:
    """Return the predicted peak of a device besides weights, optimizer state and gradients of earlier micro-batches."""
    passing = [replace(cost.in_training(), weights=0, optimizer=0, inputs=0, step=0) for cost in costs.values()]
    earlier = sum(cost.gradients for cost in passing) if costed.schedule.accumulating else 0
    alone = replace(costed.schedule, replicated=False, in_flight=1, shares_inputs=False)  # as a dry run is
    return peak(passing, alone) - earlier
