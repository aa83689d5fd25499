"""The predicted or simulated duration of a training step."""

from dataclasses import dataclass
from typing import Any, Literal

Bound = Literal["devices", "one device at a time", "host", "links"]
Origin = Literal["data sheet", "measured", "mixed"]


@dataclass(frozen=True)
class StepTime:
    """One step of the optimizer, with all micro-batches that it takes.

    Attributes:
        seconds: from the end of the step before to its end.
        tokens: how many all devices process in it, padding included; 0 if unknown.
        busy: for each device, in the order of the plan, the part of the time in which it computes, 0 to 1.
        bound: what would have to be faster: "devices" while most of them compute, "one device at a time" where each
            waits for another, the "host" that launches operations, or "links" between devices.
        rates: whether the rates of the devices are those of data sheets, measured, or some of each.
    """

    seconds: float
    tokens: int
    busy: tuple[float, ...]
    bound: Bound
    rates: Origin = "data sheet"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the field `step_time` of plans."""
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "busy": list(self.busy),
            "bound": self.bound,
            "rates": self.rates,
        }
