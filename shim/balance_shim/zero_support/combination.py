"""One entry of the table of combinations."""

from dataclasses import dataclass
from typing import Literal, get_args

Outcome = Literal["works", "works with a note", "refused"]
Area = Literal["Launching", "Configuration", "Models and weights", "Adapters", "Trainers", "Loops", "Ranks and files"]
AREAS: tuple[Area, ...] = get_args(Area)


@dataclass(frozen=True)
class Combination:
    """ZeRO-3 together with one feature of a script, a library or a machine.

    Attributes:
        key: the identifier that code and tests use.
        area: the section of the reference page.
        name: the feature, as the page shows it.
        outcome: whether it trains.
        proof: the test that shows the outcome, as `path::function` below `tests/`; a parameter in brackets.
        recognised: the condition that the shim checks; empty where it checks nothing.
        message: the line that the user reads, with `str.format` fields. Required for a refusal, without its prefix.
        reason: why the outcome is as it is, for the page; the message where that is empty.
    """

    key: str
    area: Area
    name: str
    outcome: Outcome
    proof: str
    recognised: str = ""
    message: str = ""
    reason: str = ""
