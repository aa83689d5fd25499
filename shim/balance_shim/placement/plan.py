"""A plan: a device map, and the predicted memory of each device under it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..choices import PlanMode
from ..device import Device
from ..language.message import Joined, Message
from ..map_file import DeviceMap
from ..memory.allocation_record import Record
from ..memory.cost import BlockCost, CostSource, is_estimate
from ..memory.peak import NOTHING, peak, peak_terms
from ..memory.replay import DeviceRun, EvaluationRun, replay
from ..memory.workload import Workload
from ..timing.step_time import StepTime
from ..units import MIB, format_size
from ..virtual.allocator_settings import geometry_for
from ..virtual.allocator_settings import read as read_allocator_settings
from .costed_model import CostedModel, lower_bound
from .places import place_of
from .step_time import predict

# No training is known whose allocator reserves this many times the peak of its tensors; a replay need not prove it.
SURELY_ENOUGH = 1.5
SURELY_ENOUGH_BYTES = 64 * MIB


@dataclass(frozen=True)
class DevicePlan:
    """One device under a plan. Sizes in bytes.

    Attributes:
        terms: those of the moment of the peak; they add up to it.
        run: the allocations and frees there in training; None where it was not traced.
    """

    device: Device
    terms: dict[str, int]
    run: DeviceRun | None = None

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def capacity(self) -> int:
        """The bytes that the plan may fill."""
        return self.device.capacity

    @property
    def predicted_peak(self) -> int:
        return sum(self.terms.values())

    @property
    def predicted_reserved(self) -> int | None:
        """The bytes that this process takes from the device, as its allocator rounds and fragments; None: unknown.

        At most the available memory, if giving back cached segments is enough for that.
        """
        if self.run is None:
            return None
        settings = read_allocator_settings()
        if not settings.caches:
            return self.predicted_peak
        overhead = self.terms.get("overhead", 0)
        room = self.device.available - overhead
        geometry = geometry_for(self.device.available)
        replayed = replay(self.run, max(1, room), settings, geometry)
        # A dry run may have shown more than the trace that the record is of.
        more = max(0, self.predicted_peak - overhead - replayed.allocated)
        reserved = replayed.reserved + overhead + more
        return min(reserved, max(self.device.available, self.predicted_peak)) if replayed.fits else reserved

    @property
    def shortfall(self) -> int:
        """Bytes that the device lacks; 0 if it fits.

        Tensors have to fit into the capacity, which leaves the reserve; what the allocator takes from the device into
        all that is available.
        """
        lacking = max(0, self.predicted_peak - self.capacity)
        if self.run is None or self.predicted_peak * SURELY_ENOUGH + SURELY_ENOUGH_BYTES <= self.device.available:
            return lacking
        return max(lacking, (self.predicted_reserved or 0) - self.device.available)

    @property
    def filled(self) -> float:
        """The peak as a fraction of the capacity; above 1 when it does not fit."""
        return self.predicted_peak / self.capacity


@dataclass(frozen=True)
class Plan:
    """A device map with its prediction.

    Attributes:
        mode: whose map it is: "balanced" (ours), "map" (the user's) or "auto" (transformers').
        model_class: class name of the model.
        parameters: number of parameters, tied ones once.
        workload: the workload that the prediction is for.
        devices: every device that could be used, in index order.
        device_map: full module name -> device index, "cpu" or "disk".
        lower_bound: bytes that the fullest device must hold at least, under any map.
        method: how the costs were found, for people: "traced", or what was estimated and why.
        source: the same as data.
        notes: facts that a reader of the plan should know, a line each.
        recomputed: the layers to checkpoint, where they were chosen one by one; None: as the workload has it.
        step_time: the predicted duration of a step; None where the kind of a device is unknown or nothing was traced.
    """

    mode: PlanMode
    model_class: str
    parameters: int
    workload: Workload
    devices: tuple[DevicePlan, ...]
    device_map: DeviceMap
    lower_bound: int
    method: str = ""
    source: CostSource = "trace"
    notes: tuple[str, ...] = ()
    recomputed: frozenset[str] | None = None
    step_time: StepTime | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the shim chose the map, and may change it."""
        return self.mode == "balanced"

    @property
    def is_users(self) -> bool:
        """Whether the map was given by the user."""
        return self.mode == "map"

    @property
    def is_librarys(self) -> bool:
        """Whether the map is the one that transformers would make."""
        return self.mode == "auto"

    @property
    def worst(self) -> DevicePlan:
        """The device with the highest predicted peak relative to its capacity."""
        return max(self.devices, key=lambda device: device.filled)

    def on(self, index: int) -> DevicePlan | None:
        """Return the plan of the device with this index; None if the plan has no such device."""
        return next((device for device in self.devices if device.device.index == index), None)

    @property
    def is_estimate(self) -> bool:
        """Whether a formula was used because the model could not be traced: no reason to move blocks."""
        return is_estimate(self.source)

    @property
    def shortfall(self) -> int:
        """Bytes that the device lacks that lacks most; 0 when the plan fits."""
        return max(device.shortfall for device in self.devices)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `balance-shim plan --json` and `BALANCE_REPORT` write it."""
        return {
            "mode": self.mode,
            "model": {"class": self.model_class, "parameters": self.parameters},
            "workload": self.workload.to_json(),
            "devices": [
                {
                    "name": device.name,
                    "capacity": device.capacity,
                    "predicted_peak": device.predicted_peak,
                    "predicted_reserved": device.predicted_reserved,
                    "terms": device.terms,
                }
                for device in self.devices
            ],
            "device_map": self.device_map,
            "lower_bound": self.lower_bound,
            "step_time": None if self.step_time is None else self.step_time.to_json(),
            "method": self.method,
            "recomputed": None if self.recomputed is None else sorted(self.recomputed),
            "notes": list(self.notes),
        }


def evaluate(
    mode: PlanMode, costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device], notes: Sequence[str] = ()
) -> Plan:
    """Return the plan for `device_map`: the predicted peak of each device, whoever made the map."""
    on_device: dict[int | str, list[BlockCost]] = {device.index: [] for device in devices}
    for block, cost in zip(costed.blocks, costed.costs, strict=True):
        # A map may go deeper than our blocks; a block then counts where its first tensor is.
        on_device.setdefault(place_of(block, device_map), []).append(cost)
    # Inputs arrive on, and outputs return to, the first device, whether it holds a block or not.
    on_device[devices[0].index].append(costed.first)
    device_plans = []
    decided = []
    for device in devices:
        terms = peak_terms(on_device[device.index], costed.schedule)
        if costed.workload.evaluation is not None:
            training = peak((cost.in_training() for cost in on_device[device.index]), costed.schedule)
            if training < sum(terms.values()):
                alone = format_size(training + device.overhead)
                decided.append(Message("{device} (training alone: {size})", device=device.name, size=alone))
        terms["overhead"] = device.overhead
        device_plans.append(DevicePlan(device, terms, _run(costed, device_map, device, devices[0])))
    if decided:
        evaluation, peaks_decided = str(costed.workload.evaluation), Joined(", ", decided)
        note = Message(
            "evaluation ({evaluation}) decides the peak of {devices}", evaluation=evaluation, devices=peaks_decided
        )
        notes = [*notes, note]
    return Plan(
        mode=mode,
        model_class=costed.structure.model_class,
        parameters=costed.structure.parameters,
        workload=costed.workload,
        devices=tuple(device_plans),
        device_map=dict(device_map),
        lower_bound=lower_bound(costed, devices),
        method=costed.method,
        source=costed.source,
        notes=(*notes, *_attention_notes(costed, devices)),
        step_time=predict(costed, device_map, devices),
    )


def _attention_notes(costed: CostedModel, devices: Sequence[Device]) -> list[str]:
    capabilities = sorted({device.capability for device in devices if device.capability})
    listed = ", ".join(f"{a}.{b}" for a, b in capabilities)
    on = Message(" on compute capability {versions}", versions=listed) if capabilities else ""
    notes: list[str] = []
    for dtype in costed.math_attention:
        remedy = "float16" if capabilities and capabilities[0] < (8, 0) else "bfloat16"
        alternatives = Message("another attn_implementation")
        if dtype != remedy:
            alternatives = Message("{dtype} or another attn_implementation", dtype=remedy)
        notes.append(
            Message(
                "attention in {dtype} has no fused kernel{on}: each layer keeps a matrix of sequence length squared "
                "for every head; {others} may avoid that",
                dtype=dtype,
                on=on,
                others=alternatives,
            )
        )
    return notes


def _run(costed: CostedModel, device_map: DeviceMap, device: Device, first_device: Device) -> DeviceRun | None:
    """Return the records of `device`; None if a block there was not traced."""
    blocks = [
        (cost, record)
        for block, cost, record in zip(costed.blocks, costed.costs, costed.records, strict=False)
        if place_of(block, device_map) == device.index
    ]
    if costed.first_record is None or any(record is None for _, record in blocks):
        return None
    blocks.append((costed.first, costed.first_record) if device.index == first_device.index else (NOTHING, Record()))
    ranked = sorted(
        (cost.phases[phase].rank if phase < len(cost.phases) else cost.rank, position, phase)
        for position, (cost, record) in enumerate(blocks)
        for phase in range(len(record.phases) if record is not None else 0)
    )
    *records, last = (record for _, record in blocks if record is not None)
    return DeviceRun(
        tuple(records),
        last,
        costed.schedule.accumulating,
        costed.schedule.step_at_once,
        costed.schedule.replicated,
        tuple((position, phase) for _, position, phase in ranked),
        _evaluation(costed, is_first=device.index == first_device.index),
        costed.workload.least,
        costed.schedule.in_flight,
        costed.schedule.in_chunks,
    )


def _evaluation(costed: CostedModel, is_first: bool) -> EvaluationRun | None:
    evaluation = costed.workload.evaluation
    if evaluation is None:
        return None
    if not is_first or evaluation.returns == "loss":
        return EvaluationRun()
    outputs = evaluation.left_by_batch(costed.evaluation_outputs)
    batches = max(1, -(-evaluation.accumulated_sequences // evaluation.batch_size))
    most = outputs * evaluation.accumulated_sequences // evaluation.batch_size
    return EvaluationRun(batches, outputs, most, evaluation.joined)


def collapse(device_map: DeviceMap) -> DeviceMap:
    """Return {"": device} for a map of one device: accelerate takes any map of several entries for several devices."""
    places = set(device_map.values())
    return {"": places.pop()} if len(places) == 1 else device_map
