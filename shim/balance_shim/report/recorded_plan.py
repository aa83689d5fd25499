"""A plan as it was written: `plan.json` of a report folder, and the output of `balance-shim plan --json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedDevice:
    """One device of a plan. Sizes in bytes; `terms` by name, in the order in which they are stacked."""

    name: str
    capacity: int
    predicted_peak: int
    predicted_reserved: int | None
    terms: Mapping[str, int]


@dataclass(frozen=True)
class StepTime:
    """A predicted step: seconds, tokens per second, each device's busy share, and the part that bounds the time.

    `bound` is as in `timing.step_time.StepTime`; "" if unknown.
    """

    seconds: float
    tokens_per_second: float | None
    busy: Mapping[str, float]
    bound: str = ""


@dataclass(frozen=True)
class PlanRecord:
    """A plan as `plan.json` has it.

    Attributes:
        number: of its files; those of a run's second model have 2.
        mode: whose map it is: "balanced", "map" or "auto".
        step_time: None where no time is predicted.
    """

    number: int
    mode: str
    model_class: str
    parameters: int
    workload: Mapping[str, Any]
    devices: tuple[PlannedDevice, ...]
    device_map: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    step_time: StepTime | None = None

    @property
    def is_librarys(self) -> bool:
        """Whether the map is the one that transformers would make."""
        return self.mode == "auto"


def plan_of(entry: Any, number: int) -> PlanRecord:
    """Return the plan that `entry`, of a plan's JSON, describes.

    Raises:
        KeyError, TypeError, ValueError: it lacks a field, or has one of another type.
    """
    devices = tuple(
        PlannedDevice(
            str(device["name"]),
            max(1, int(device["capacity"])),
            int(device["predicted_peak"]),
            None if device.get("predicted_reserved") is None else int(device["predicted_reserved"]),
            {str(term): int(size) for term, size in device["terms"].items()},
        )
        for device in entry["devices"]
    )
    return PlanRecord(
        number=number,
        mode=str(entry.get("mode", "balanced")),
        model_class=str(entry["model"]["class"]),
        parameters=int(entry["model"]["parameters"]),
        workload=dict(entry["workload"]),
        devices=devices,
        device_map=dict(entry["device_map"]),
        notes=tuple(map(str, entry.get("notes") or ())),
        step_time=step_time_of(entry.get("step_time"), [device.name for device in devices]),
    )


def step_time_of(entry: Any, names: list[str]) -> StepTime | None:
    """Return the `step_time` of a plan in JSON; `busy` there is a mapping by name, or a list in the devices' order."""
    if not entry:
        return None
    busy = entry.get("busy") or {}
    shares = busy.items() if isinstance(busy, Mapping) else zip(names, busy, strict=False)
    tokens = entry.get("tokens_per_second")
    return StepTime(
        float(entry["seconds"]),
        None if tokens is None else float(tokens),
        {str(name): float(share) for name, share in shares if share is not None},
        str(entry.get("bound") or ""),
    )
