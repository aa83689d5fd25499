"""The candidates that `BALANCE_MODE=auto` chooses from, as data."""

from dataclasses import dataclass
from typing import Any, Literal

from ..timing.step_time import StepTime

# Simplest first: of candidates that are equally fast the simpler one is chosen.
RemedyName = Literal[
    "one_device", "balanced", "checkpointing", "pipeline", "replicas", "replicas_checkpointing", "zero3",
    "zero3_offload",
]  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One way to train a model on the devices that are there.

    Attributes:
        remedy: what is done.
        count: replicas, ranks or micro-batches in flight; 1 where nothing is counted.
        possible: whether this process can do it at all.
        fits: whether everything fits, with the reserve kept free.
        worst_fill: the highest peak of a device as a fraction of its capacity; None where it is unknown.
        step_time: None where the kind of a device is unknown, or it is not possible.
        reason: why it lost, or was chosen, for people.
    """

    remedy: RemedyName
    count: int = 1
    possible: bool = True
    fits: bool = False
    worst_fill: float | None = None
    step_time: StepTime | None = None
    reason: str = ""

    @property
    def can_win(self) -> bool:
        return self.possible and self.fits

    def to_json(self) -> dict[str, Any]:
        """Return an entry of `candidates` in plans."""
        return {
            "remedy": self.remedy,
            "count": self.count,
            "possible": self.possible,
            "fits": self.fits,
            "worst_fill": self.worst_fill,
            "step_time": None if self.step_time is None else self.step_time.to_json(),
            "reason": self.reason,
        }
