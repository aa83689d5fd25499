"""From the records of the sweep to one table in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

TOLERANCE = 1e-5  # of losses, relative; everything is float32 and dropout is off
OUTCOMES = ("runs under both", "healed", "same failure", "broken by us", "loss differs", "not trainable here")


def outcome(record: dict[str, Any]) -> str:
    """Return which of OUTCOMES a record shows."""
    if "reference" not in record or "error" in record["reference"]:
        return "not trainable here"
    balanced, library = record["balanced"], record["off"]
    if "error" in balanced:
        return "same failure" if "error" in library else "broken by us"
    if not same_losses(record, "balanced") and (same_losses(record, "off") or "error" in library):
        return "loss differs"
    return "healed" if "error" in library else "runs under both"


def same_losses(record: dict[str, Any], mode: str) -> bool:
    """Whether the losses of `mode` are those of one device."""
    reference, losses = record["reference"]["losses"], record[mode].get("losses", [])
    return len(reference) == len(losses) and all(
        math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=1e-7) for pair in zip(reference, losses, strict=True)
    )


def traced(record: dict[str, Any]) -> str:
    """Return how the plan found its costs."""
    method = record.get("balanced", {}).get("method")
    if method is None:
        return "no plan"
    if method.startswith("estimated"):
        return "estimated"
    return "traced" if method in ("", "traced") else "partly traced"


def summary(records: list[dict[str, Any]]) -> str:
    """Return the counts by task, as a table."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    lines = [_line("task", "classes", *OUTCOMES), _line("---", *["---:"] * (len(OUTCOMES) + 1))]
    for task in [*tasks, "all"]:
        of_task = [record for record in records if task in (record["task"], "all")]
        counts = Counter(outcome(record) for record in of_task)
        lines.append(_line(task, len(of_task), *(counts[result] for result in OUTCOMES)))
    plans = Counter(traced(record) for record in records if outcome(record) != "not trainable here")
    lines += ["", "Plans: " + ", ".join(f"{count} {how}" for how, count in plans.most_common()) + "."]
    return "\n".join(lines)


def table(records: list[dict[str, Any]]) -> str:
    """Return a line for each class that trains on one device."""
    lines = [
        _line("task", "class", "outcome", "plan", "losses", "devices: library, balanced", "inputs"),
        _line(*["---"] * 7),
    ]
    for record in records:
        result = outcome(record)
        if result == "not trainable here":
            continue
        losses = ", ".join(
            f"{mode} {'equal' if same_losses(record, mode) else 'differ'}"
            for mode in ("off", "balanced")
            if "error" not in record[mode]
        )
        places = f"{record['off'].get('devices', '-')}, {record['balanced'].get('final_devices', '-')}"
        name = f"`{record['name']}`" + ("" if record["reference"].get("declared") else " °")
        inputs = record["reference"]["inputs"] + (" *" if record["reference"].get("own_loss") else "")
        lines.append(_line(record["task"], name, result, traced(record), losses or "-", places, inputs))
    return "\n".join(lines)


def failures(records: list[dict[str, Any]], *outcomes: str) -> str:
    """Return the reasons of the records with one of these outcomes, a line each."""
    lines = []
    for record in records:
        result = outcome(record)
        if result in outcomes:
            source = record["reference"] if result == "not trainable here" else record["balanced"]
            reason = str(source.get("error") or f"{record['reference']['losses']} {source.get('losses')}")
            lines.append(f"- `{record['name']}` ({record['task']}): {reason[:240].replace('|', '/')}")
    return "\n".join(lines)


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
