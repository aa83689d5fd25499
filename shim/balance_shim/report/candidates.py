"""The table of mode `auto`: what each candidate would take, and why one was chosen."""

from ..placement.candidates import Candidate, Choice
from ..units import counted
from .step_time import duration
from .table import table


def name_of(candidate: Candidate) -> str:
    """Return what a candidate is, for people."""
    names = {
        "one_device": "one device",
        "balanced": "balanced map",
        "checkpointing": "balanced map",
        "pipeline": f"balanced map, {counted(candidate.count, 'micro-batch')} in flight",
        "replicas": f"{counted(candidate.count, 'replica')} of a map",
        "zero3": f"ZeRO-3 on {counted(candidate.count, 'rank')}",
        "zero3_offload": f"ZeRO-3 on {counted(candidate.count, 'rank')}, {_offloaded(candidate)} in host memory",
    }
    return names[candidate.remedy] + (", layers recomputed" if candidate.recomputes else "")


def _offloaded(candidate: Candidate) -> str:
    return "weights and optimizer state" if candidate.offload == "all" else "optimizer state"


def candidates_table(choice: Choice) -> str:
    """Return a table with a line for each candidate; the chosen one has a mark."""
    rows = []
    for candidate in choice.candidates:
        time = candidate.step_time
        rows.append(
            [
                ("* " if candidate is choice.chosen else "  ") + name_of(candidate),
                "-" if candidate.worst_fill is None else f"{candidate.worst_fill:.0%}",
                "-" if time is None else duration(time.seconds),
                "-" if time is None or not time.tokens else f"{time.tokens_per_second:,.0f}",
            ]
        )
    lines = table(["candidate", "fullest device", "step", "tokens/s"], rows).splitlines()
    return "\n".join(f"{line}  {reason}" for line, reason in zip(lines, ["reason", *_reasons(choice)], strict=True))


def _reasons(choice: Choice) -> list[str]:
    return [candidate.reason for candidate in choice.candidates]


def verdict(choice: Choice) -> str:
    """Return a line on what was chosen, or on what would fit."""
    if choice.chosen is not None:
        return f"mode auto chooses: {name_of(choice.chosen)}: {choice.chosen.reason}"
    change = f"; the smallest change that would fit: {choice.change}" if choice.change else (
        "; use more or larger devices, 4- or 8-bit loading, or LoRA"
    )  # fmt: skip
    return f"mode auto: nothing fits{change}"
