"""Plan a recorded training again: under transformers' own map, and with other lengths, micro-batches, checkpointing.

Everything needed is in `run.json` and `plan.json`: no weights are read, and no accelerator is needed.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .. import planning, state
from ..device import Device
from ..device_spec import SimulationSpec
from ..errors import BalanceError
from ..memory.evaluation import Evaluation
from ..memory.workload import Workload
from ..plan_options import PRECISIONS, PlanOptions
from ..settings import Settings
from ..timing.rates import DeviceRates
from .folder import RunFolder
from .recorded_plan import PlannedDevice, PlanRecord, StepTime, step_time_of

if TYPE_CHECKING:
    from ..placement.plan import Plan
    from ..placement.request import Request

SECONDS = 90  # for the table; combinations beyond it stay empty
LENGTHS, BATCHES = (0.25, 0.5, 1, 2, 4), (1, 2, 4, 8)
LEAST_LENGTH = 16  # tokens


@dataclass(frozen=True)
class Before:
    """The same training under transformers' own map.

    Attributes:
        devices: the peak of each, and its terms.
        offloaded: place ("cpu", "disk") -> bytes of weights that the map leaves there, which cannot be trained.
        fits: whether nothing is left there, and no device is over its capacity.
    """

    devices: tuple[PlannedDevice, ...]
    offloaded: Mapping[str, int]
    fits: bool


@dataclass(frozen=True)
class Combination:
    """One cell of the table, under the best map for it.

    Attributes:
        worst: name of the fullest device; "" where not even the weights fit.
        peak, capacity: of it, in bytes.
        reserved: whether `peak` is what its allocator reserves and `capacity` what is available: tensors alone fit.
        step_time: None where no time is predicted.
    """

    seq_len: int
    batch_size: int
    checkpointing: bool
    fits: bool
    worst: str = ""
    peak: int = 0
    capacity: int = 0
    reserved: bool = False
    step_time: StepTime | None = None


@dataclass(frozen=True)
class Replanned:
    """The result of planning again; each reason is "" where the result is there.

    Attributes:
        combinations: those that were computed in time.
        exact: whether the training's own trainable parameters are known; else adapters or frozen parts are assumed.
    """

    before: Before | None = None
    no_before: str = ""
    combinations: tuple[Combination, ...] = ()
    no_combinations: str = ""
    incomplete: bool = False
    exact: bool = True


def replan(run: RunFolder, trust_remote_code: bool = False, seconds: float = SECONDS) -> Replanned:
    """Plan the latest training of `run` again; parts that cannot be planned are left out, with a reason.

    Args:
        run: the folder that was read.
        trust_remote_code: whether code that comes with the model may run.
        seconds: for the table.
    """
    models = {model.get("number"): model for model in run.run.get("models") or () if isinstance(model, Mapping)}
    plan = run.plans[0] if run.plans else None
    stored = None if plan is None else models.get(plan.number)
    if plan is None or stored is None or not stored.get("config"):
        reason = "the folder has no plan with its model's config"
        return Replanned(no_before=reason, no_combinations=reason)
    try:
        with planning.quiet_libraries():
            request, auto_map, failure = _request(plan, stored, trust_remote_code)
            before, no_before = None, failure
            if int(run.run.get("ranks") or 1) > 1:
                no_before = "transformers refuses device maps in several processes"
            elif auto_map is not None:
                before = _before(request, auto_map)
            combinations, incomplete = _combinations(request, seconds)
    except BalanceError as error:
        reason = str(error).splitlines()[0]
        return Replanned(no_before=reason, no_combinations=reason)
    except Exception as error:  # of a model's code, or of a config that another version wrote
        reason = f"the model cannot be planned again: {type(error).__name__}: {error}".splitlines()[0][:300]
        return Replanned(no_before=reason, no_combinations=reason)
    exact = plan.workload.get("tuning") == "full"
    return Replanned(before, no_before, tuple(combinations), "", incomplete, exact)


def _request(
    plan: PlanRecord, stored: Mapping[str, Any], trust_remote_code: bool
) -> "tuple[Request, Mapping[str, int | str] | None, str]":
    """Return the request, transformers' map for its devices, and why there is none."""
    devices = tuple(_device(description) for description in stored["devices"])
    precision = next((short for short, name in PRECISIONS.items() if name == stored.get("dtype")), None)
    options = PlanOptions(
        model="config.json",
        machine=SimulationSpec(tuple(device.available for device in devices)),
        settings=Settings(cache=state.settings().cache),
        precision=precision,
        trust_remote_code=trust_remote_code,
    )
    source = os.path.expanduser(str(stored.get("source") or ""))
    if trust_remote_code and stored["config"].get("auto_map") and source:  # its code lies there
        subject = planning.subject_of(source, options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(stored["config"], file)
            subject = planning.subject_of(path, options)
    request = replace(planning.request_for(subject, options), devices=devices)
    request = request.with_case(workload=_workload(plan.workload))
    auto_map = subject.ready.auto_map
    if auto_map is None:
        return request, None, subject.ready.auto_failure
    return (
        request,
        {name: devices[place].index if isinstance(place, int) else place for name, place in auto_map.items()},
        "",
    )


def _device(stored: Mapping[str, Any]) -> Device:
    values = _fields_of(Device, stored)
    capability, rates = values.get("capability"), values.get("rates")
    values["capability"] = None if capability is None else tuple(capability)
    values["rates"] = DeviceRates(**_fields_of(DeviceRates, rates)) if isinstance(rates, Mapping) else None
    return Device(**values)


def _fields_of(kind: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `stored` that a dataclass has fields for: another version may have written more."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in stored.items() if name in names}


def _workload(stored: Mapping[str, Any]) -> Workload:
    values = _fields_of(Workload, stored)
    if isinstance(values.get("evaluation"), Mapping):
        values["evaluation"] = Evaluation(**values["evaluation"])
    return Workload(**values)


def _before(request: "Request", auto_map: Mapping[str, int | str]) -> Before:
    from ..placement import planner
    from ..placement.baseline import judge

    # Without the shim nobody cuts up the loss or repeats keys and values.
    alone = replace(request.with_workload(loss="full"), repeats_grouped_keys=False)
    return before_of(judge(planner.cost(alone), dict(auto_map), request.devices).to_json())


def before_of(written: Mapping[str, Any]) -> Before:
    """Return the baseline that `written`, of a plan's JSON, describes."""
    devices = tuple(
        PlannedDevice(device["name"], max(1, device["capacity"]), device["predicted_peak"], None, device["terms"])
        for device in written["devices"]
    )
    offloaded = {place: offload["weights"] for place, offload in written["offloaded"].items()}
    return Before(devices, offloaded, bool(written["fits"]))


def _combinations(request: "Request", seconds: float) -> tuple[list[Combination], bool]:
    """Return the combinations, and whether time ran out before all of them were planned.

    That of the run comes first, then the cheapest to plan.
    """
    from ..memory.cost import is_estimate
    from ..memory.tracing import too_long
    from ..placement import planner

    ends = time.monotonic() + seconds
    workload = request.workload
    current = (workload.seq_len, workload.batch_size, workload.gradient_checkpointing)
    combinations: list[Combination] = []
    # One that does not run on shapes would try that for each combination, which can take minutes.
    estimated = is_estimate(planner.cost(request).source)
    with too_long.estimating() if estimated else nullcontext():
        request = replace(request, cache=None) if estimated else request
        for candidate in (current, *(candidate for candidate in _grid(request) if candidate != current)):
            if time.monotonic() > ends:
                return combinations, True
            combinations.append(_combination(request, *candidate))
    return combinations, False


def _grid(request: "Request") -> Iterator[tuple[int, int, bool]]:
    from ..memory.recomputation import is_supported
    from ..memory.workload import longest_row

    workload = request.workload
    longest = longest_row(getattr(request.model, "config", None)) or 1 << 31
    scaled = {int(workload.seq_len * factor) for factor in LENGTHS}
    lengths = {length for length in scaled if LEAST_LENGTH <= length <= longest}
    lengths.add(workload.seq_len)
    choices = [False, True] if is_supported(request.model) else [workload.gradient_checkpointing]
    for seq_len in sorted(lengths):
        for batch_size in sorted({*BATCHES, workload.batch_size}):
            for checkpointing in choices:
                yield seq_len, batch_size, checkpointing


def _combination(request: "Request", seq_len: int, batch_size: int, checkpointing: bool) -> Combination:
    from ..placement import planner
    from ..placement.balance import DoesNotFit, balance
    from ..placement.plan import evaluate

    other = request.with_workload(
        seq_len=seq_len, batch_size=batch_size, gradient_checkpointing=checkpointing, shortest=0
    )
    costed = planner.cost(other)
    try:
        plan = evaluate("balanced", costed, balance(costed, other.devices), other.devices)
    except DoesNotFit:
        return Combination(seq_len, batch_size, checkpointing, fits=False)
    step_time = _step_time(plan, [device.name for device in plan.devices])
    key, worst = (seq_len, batch_size, checkpointing), plan.worst
    if plan.shortfall and worst.filled <= 1:
        worst = max(plan.devices, key=lambda device: device.shortfall)
        reserved, available = worst.predicted_reserved or 0, worst.device.available
        return Combination(*key, False, worst.name, reserved, available, True, step_time)
    return Combination(*key, not plan.shortfall, worst.name, worst.predicted_peak, worst.capacity, False, step_time)


def _step_time(plan: "Plan", names: Sequence[str]) -> StepTime | None:
    return step_time_of(plan.to_json().get("step_time"), list(names))
