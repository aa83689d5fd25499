"""What `BALANCE_MODE=auto` chooses from, and how it chooses: data and a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..language.message import Message
from ..timing.step_time import StepTime

if TYPE_CHECKING:
    from .plan import Plan
    from .request import Request

RemedyName = Literal["one_device", "balanced", "checkpointing", "pipeline", "replicas", "zero3", "zero3_offload"]
SIMPLEST_FIRST: tuple[RemedyName, ...] = (
    "one_device", "balanced", "checkpointing", "pipeline", "replicas", "zero3", "zero3_offload"
)  # fmt: skip
# Where nobody knows how fast the devices are: all devices in one process, then what else makes the model fit.
WITHOUT_TIMES: tuple[RemedyName, ...] = (
    "balanced", "one_device", "checkpointing", "zero3", "zero3_offload", "replicas", "pipeline"
)  # fmt: skip
EQUALLY_FAST = 0.02  # of the tokens per second: predictions are no better, and a simpler remedy is worth more


@dataclass(frozen=True)
class Candidate:
    """One way to train a model on the devices that are there.

    Attributes:
        remedy: what is done.
        count: replicas, ranks or micro-batches in flight; 1 where nothing is counted.
        recomputes: whether layers are recomputed, which the user has not asked for.
        offload: what ZeRO-3 keeps in host memory: "none", "optimizer" or "all".
        impossible: why this process cannot do it; "" if it can.
        fits: whether everything fits, with the reserve kept free.
        worst_fill: the highest peak of a device as a fraction of its capacity; None where not even the weights fit.
        step_time: None where the kind of a device is unknown, or nothing could be traced.
        reason: why it lost, or was chosen, for people.
        plan: the map, where it is one.
        request: what `plan` was made for.
    """

    remedy: RemedyName
    count: int = 1
    recomputes: bool = False
    offload: str = "none"
    impossible: str = ""
    fits: bool = False
    worst_fill: float | None = None
    step_time: StepTime | None = None
    reason: str = ""
    plan: "Plan | None" = field(default=None, compare=False, repr=False)
    request: "Request | None" = field(default=None, compare=False, repr=False)

    @property
    def is_zero3(self) -> bool:
        return self.remedy in ("zero3", "zero3_offload")

    @property
    def can_win(self) -> bool:
        return self.fits and not self.impossible

    def to_json(self) -> dict[str, Any]:
        """Return an entry of `candidates` in plans."""
        return {
            "remedy": self.remedy,
            "count": self.count,
            "recomputes": self.recomputes,
            "offload": self.offload,
            "possible": not self.impossible,
            "fits": self.fits,
            "worst_fill": self.worst_fill,
            "step_time": None if self.step_time is None else self.step_time.to_json(),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Choice:
    """What mode `auto` chose.

    Attributes:
        candidates: all of them, each with its reason, simplest first.
        chosen: one of `candidates`; None where nothing fits.
        change: where nothing fits, the smallest change under which something would; "" if none is known.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    change: str = ""


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Choose the fastest candidate that fits; of those that are equally fast, the simplest.

    Tokens per second count, because replicas and ranks process more tokens in a step.
    """
    ordered = sorted(candidates, key=lambda candidate: SIMPLEST_FIRST.index(candidate.remedy))
    contenders = [candidate for candidate in ordered if candidate.can_win]
    if not contenders:
        return Choice(tuple(_lost(candidate, None) for candidate in ordered), None)
    if any(candidate.step_time is None for candidate in contenders):
        chosen = min(contenders, key=lambda candidate: WITHOUT_TIMES.index(candidate.remedy))
        why = Message("the first that fits; the kind of the devices, and so their speed, is unknown")
    else:
        fastest = max(map(_rate, contenders))
        chosen = next(candidate for candidate in contenders if _rate(candidate) >= fastest * (1 - EQUALLY_FAST))
        alone = len(contenders) == 1
        why = Message("the only one that fits") if alone else Message("the fastest that fits")
        if _rate(chosen) < fastest:
            why = Message("as fast as any that fits, and the simplest of these")
    winner = replace(chosen, reason=why)
    return Choice(tuple(winner if candidate is chosen else _lost(candidate, chosen) for candidate in ordered), winner)


def _rate(candidate: Candidate) -> float:
    return candidate.step_time.tokens_per_second if candidate.step_time is not None else 0.0


def _lost(candidate: Candidate, winner: Candidate | None) -> Candidate:
    if candidate.impossible:
        return replace(candidate, reason=candidate.impossible)
    if not candidate.fits:
        if candidate.worst_fill is None:
            return replace(candidate, reason=Message("does not fit: not even its weights do"))
        return replace(
            candidate, reason=Message("does not fit: {fill} of the fullest device", fill=f"{candidate.worst_fill:.0%}")
        )
    if winner is None or not _rate(candidate) or not _rate(winner):
        return replace(candidate, reason=Message("fits; how fast it is compared to what was chosen is unknown"))
    if _rate(candidate) < _rate(winner):
        speed = f"{_rate(candidate) / _rate(winner):.2f}"
        return replace(candidate, reason=Message("{factor} times the speed of what was chosen", factor=speed))
    return replace(candidate, reason=Message("hardly faster than what was chosen, which is simpler"))
