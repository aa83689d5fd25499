"""The table of mode `auto`: the time and memory of each candidate, and why one was chosen."""

from typing import Any

from ..language.message import Message
from ..language.speaker import Say, english
from ..placement.candidates import Candidate, Choice
from .step_time import duration
from .table import table

HEADER = ("candidate", "fullest device", "step", "tokens/s")


def name_of(candidate: Candidate) -> str:
    """Return a candidate's description, for people."""
    count = candidate.count
    names = {
        "one_device": Message("one device"),
        "balanced": Message("balanced map"),
        "checkpointing": Message("balanced map"),
        "pipeline": _pipeline(count),
        "replicas": Message("{number} of a map", number=_replicas(count)),
        "zero3": Message("ZeRO-3 on {number}", number=_ranks(count)),
        "zero3_offload": Message(
            "ZeRO-3 on {number}, {what} in host memory", number=_ranks(count), what=_offloaded(candidate)
        ),
    }
    name = names[candidate.remedy]
    return Message("{name}, layers recomputed", name=name) if candidate.recomputes else name


def _offloaded(candidate: Candidate) -> str:
    return Message("weights and optimizer state") if candidate.offload == "all" else Message("optimizer state")


def _ranks(count: int) -> str:
    return Message("1 rank") if count == 1 else Message("{count} ranks", count=count)


def _replicas(count: int) -> str:
    return Message("1 replica") if count == 1 else Message("{count} replicas", count=count)


def _pipeline(count: int) -> str:
    if count == 1:  # none could be tried: there is one in a step, or not even the weights fit
        return Message("balanced map, micro-batches in flight")
    return Message("balanced map, {count} micro-batches in flight", count=count)


def candidates_table(choice: Choice, say: Say = english) -> str:
    """Return a table with a line for each candidate; the chosen one has a mark."""
    lines = table([say(word) for word in HEADER], _rows(choice, say)).splitlines()
    reasons = ["reason", *_reasons(choice)]
    return "\n".join(f"{line}  {say(reason)}" for line, reason in zip(lines, reasons, strict=True))


def facts(choice: Choice) -> dict[str, Any]:
    """Return the choice for `events.jsonl`: the verdict, and the table with its reasons."""
    rows = [[*row, reason] for row, reason in zip(_rows(choice), _reasons(choice), strict=True)]
    return {"headline": verdict(choice), "table": [[*HEADER, "reason"], *rows]}


def _rows(choice: Choice, say: Say = english) -> list[list[str]]:
    """Return the cells under `HEADER`."""
    rows = []
    for candidate in choice.candidates:
        time = candidate.step_time
        rows.append(
            [
                ("* " if candidate is choice.chosen else "  ") + say(name_of(candidate)),
                "-" if candidate.worst_fill is None else f"{candidate.worst_fill:.0%}",
                "-" if time is None else duration(time.seconds),
                "-" if time is None or not time.tokens else f"{time.tokens_per_second:,.0f}",
            ]
        )
    return rows


def _reasons(choice: Choice) -> list[str]:
    return [candidate.reason for candidate in choice.candidates]


def verdict(choice: Choice) -> str:
    """Return a line on the chosen candidate, or on a change that would fit."""
    if choice.chosen is not None:
        name, reason = name_of(choice.chosen), choice.chosen.reason
        return Message("mode auto chooses {name}: {reason}", name=name, reason=reason)
    if choice.change:
        return Message("mode auto: nothing fits; the smallest change that would fit: {change}", change=choice.change)
    return Message("mode auto: nothing fits; use more or larger devices, 4- or 8-bit loading, or LoRA")
