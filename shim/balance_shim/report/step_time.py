"""The time of a training step, for people."""

from ..language.message import Message
from ..timing.step_time import Bound, StepTime

_BOUNDS: dict[Bound, str] = {
    "devices": "bound by the devices",
    "one device at a time": "one device computes at a time",
    "host": "bound by the host, which launches operations",
    "links": "bound by the links between devices",
}


def describe(step_time: StepTime) -> str:
    """Return "1.23 s (3,330 tokens/s), one device computes at a time, rates of data sheets"."""
    tokens = f" ({step_time.tokens_per_second:,.0f} tokens/s)" if step_time.tokens else ""
    rates = {"data sheet": "rates of data sheets", "measured": "measured rates", "mixed": "rates in part measured"}
    return Message(
        "{time}, {bound}, {rates}",
        time=f"{duration(step_time.seconds)}{tokens}",
        bound=_BOUNDS[step_time.bound],
        rates=rates[step_time.rates],
    )


def duration(seconds: float) -> str:
    """Return seconds or milliseconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
