"""The what-if table: its cells as text, and the answers for the script that looks up a choice."""

from typing import Any

from ...units import format_size
from ..folder import RunFolder
from ..texts import PAGE
from ..what_if import Combination, Replanned
from .summary import seconds

Key = tuple[bool, int, int]  # checkpointing, tokens per sequence, micro-batch


def what_if(run: RunFolder, replanned: Replanned) -> dict[str, Any]:
    """Return the table, one for each choice of checkpointing, and `data` for the script; None where there is none."""
    cells = {
        (combination.checkpointing, combination.seq_len, combination.batch_size): combination
        for combination in replanned.combinations
    }
    if not cells:
        return {"reason": PAGE["no_what_if"].format(reason=replanned.no_combinations), "data": None}
    workload = run.plans[0].workload
    current: Key = (
        bool(workload.get("gradient_checkpointing")),
        int(workload.get("seq_len") or 0),
        int(workload.get("batch_size") or 0),
    )
    choices = sorted({choice for choice, _, _ in cells})
    lengths = sorted({length for _, length, _ in cells})
    batches = sorted({batch for _, _, batch in cells})
    tables = [
        {
            "checkpointing": _switch(choice),
            "rows": [
                {
                    "length": length,
                    "cells": [_cell(cells.get((choice, length, batch)), (choice, length, batch) == current)
                              for batch in batches],
                }
                for length in lengths
            ],
        }
        for choice in choices
    ]  # fmt: skip
    answers = {_name(key): _answer(cell) for key, cell in cells.items()}
    return {
        "reason": "",
        "tables": tables,
        "lengths": lengths,
        "batches": batches,
        "choices": [{"key": int(choice), "label": _switch(choice)} for choice in choices],
        "current": [int(current[0]), current[1], current[2]],
        "incomplete": replanned.incomplete,
        "exact": replanned.exact,
        "data": {"answers": answers, "missing": PAGE["not_computed"]},
    }


def _name(key: Key) -> str:
    return f"{int(key[0])}|{key[1]}|{key[2]}"


def _switch(choice: bool) -> str:
    return PAGE["on"] if choice else PAGE["off"]


def _cell(cell: Combination | None, is_current: bool) -> dict[str, str]:
    if cell is None:
        return {"css": "missing", "mark": "", "text": PAGE["not_computed"], "note": "", "key": ""}
    notes = [f"{cell.worst} {_share(cell)}" if cell.worst else PAGE["no_map"]]
    if cell.step_time is not None:
        notes.append(seconds(cell.step_time.seconds))
    if is_current:
        notes.append(PAGE["this_run"])
    return {
        "css": ("fits" if cell.fits else "over") + (" current" if is_current else ""),
        "mark": "\u2713" if cell.fits else "\u2717",
        "text": PAGE["fits"] if cell.fits else PAGE["does_not_fit"],
        "note": ", ".join(notes),
        "key": _name((cell.checkpointing, cell.seq_len, cell.batch_size)),
    }


def _share(cell: Combination) -> str:
    share = f"{cell.peak / cell.capacity:.0%}"
    return PAGE["share_reserved"].format(share=share) if cell.reserved else share


def _answer(cell: Combination) -> dict[str, Any]:
    verdict = PAGE["fits"] if cell.fits else PAGE["does_not_fit"]
    if not cell.worst:
        return {"fits": False, "text": f"{verdict}: {PAGE['no_map']}."}
    time = "" if cell.step_time is None else PAGE["what_if_time"].format(seconds=seconds(cell.step_time.seconds))
    text = PAGE["what_if_answer"].format(
        verdict=verdict,
        device=cell.worst,
        peak=format_size(cell.peak),
        capacity=format_size(cell.capacity),
        share=_share(cell),
        time=time,
    )
    return {"fits": cell.fits, "text": text}
