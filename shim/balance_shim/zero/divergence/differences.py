"""Where the notes of ranks part, in one line: which rank skips which module, or which parameter has no gradient."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ADVICE = (
    "ZeRO-3 needs every rank to run the same modules: give each batch the inputs they need (a blank "
    "picture in batches without one), or group the samples so that all ranks get batches of one kind"
)
# Exceptions of torch.distributed and DeepSpeed in a rank because of another one.
_CONSEQUENCES = ("", "RuntimeError", "AssertionError", "DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class _Pass:
    """The modules that a rank has run in one pass. `ended`: the pass is over, so missing modules were left out."""

    modules: list[int]
    gradients: list[int]
    last_modules: list[int]
    last_gradients: list[int]
    ended: bool


def difference(
    notes: Mapping[int, Mapping[str, Any]], names: list[str], parameters: list[str], is_lost: bool = True
) -> str | None:
    """Return one line on the first difference between the first rank and another; None where notes agree.

    Args:
        notes: by rank, as `FlightRecord.as_dict` has them.
        names: of the modules.
        parameters: names of the parameters and modules that the backward pass reaches.
        is_lost: whether nothing but waiting for each other is wrong with the ranks, so that the pass before may be the
            reason. It may have ended well although ranks differed, where all weights happened to be there.
    """
    if 0 not in notes:
        return None
    first = notes[0]
    for rank, other in sorted(notes.items()):
        line = None if rank == 0 else _difference_of_two(first, rank, other, names, parameters, is_lost)
        if line is not None:
            return line
    waiting = any(not note["failed"] for note in notes.values())
    for rank, other in sorted(notes.items()):
        if waiting and other["failed"] not in _CONSEQUENCES:
            return f"rank {rank} has left step {abs(other['step'])} with {other['failed']}, and the others wait for it"
    return None


def _difference_of_two(
    first: Mapping[str, Any],
    rank: int,
    other: Mapping[str, Any],
    names: list[str],
    parameters: list[str],
    is_lost: bool,
) -> str | None:
    latest = min(first["number"], other["number"])
    step = (first if first["number"] == latest else other)["step"]
    for number in (latest - 1, latest) if is_lost else (latest,):
        first_pass, other_pass = _pass(first, number), _pass(other, number)
        if first_pass is None or other_pass is None:
            continue
        when = f"in an evaluation after step {-step}" if step <= 0 else f"in step {step}"
        if number < latest and step > 0:
            when = f"in the pass before step {step}"
        finding, line = "ranks run different modules", _first_difference(rank, first_pass, other_pass, names)
        if line is None:
            finding = "ranks have different backward passes"
            line = _first_missing_gradient(rank, first_pass, other_pass, parameters)
        if line is not None:
            return f"{finding} {when}: {line}{_inputs_of_one(first, rank, other)}; {ADVICE}"
    return None


def _pass(notes: Mapping[str, Any], number: int) -> _Pass | None:
    """Return the notes of a rank on the pass `number`: its present one, or the one before."""
    if notes["number"] == number:
        lists = notes["order"], notes["gradients"], notes["last"], notes["last_gradients"]
        return _Pass(*lists, ended=notes["ended"])
    if notes["number"] == number + 1:
        return _Pass(notes["last"], notes["last_gradients"], [], [], ended=True)
    return None


def _first_difference(rank: int, first: _Pass, other: _Pass, names: list[str]) -> str | None:
    place = _place(first.modules, first.ended, other.modules, other.ended)
    if place is None:
        return None
    left_out = _left_out(rank, place, first.modules, other.modules, first.last_modules, other.last_modules)
    if left_out is not None:
        skips, runs, missing = left_out
        return f"rank {skips} skips {_group([names[index] for index in missing])}, which rank {runs} runs"
    return f"rank 0 runs {names[first.modules[place]]} where rank {rank} runs {names[other.modules[place]]}"


def _first_missing_gradient(rank: int, first: _Pass, other: _Pass, parameters: list[str]) -> str | None:
    place = _place(first.gradients, first.ended, other.gradients, other.ended)
    if place is None:
        return None
    left_out = _left_out(rank, place, first.gradients, other.gradients, first.last_gradients, other.last_gradients)
    if left_out is not None:
        lacks, has, missing = left_out
        group = _group([parameters[index] for index in missing])
        return f"only on rank {has}, not on rank {lacks}, gradients reach {group}"
    first_name, other_name = parameters[first.gradients[place]], parameters[other.gradients[place]]
    return f"gradients reach {first_name} on rank 0 where they reach {other_name} on rank {rank}"


def _left_out(
    rank: int, place: int, first: list[int], other: list[int], first_last: list[int], other_last: list[int]
) -> tuple[int, int, list[int]] | None:
    """Return which rank leaves out modules that another one runs, from the first difference on; None where unclear.

    Where the rank that runs all has not come far, only the pass before tells what the other one has left out.
    """
    first_rest, other_rest = first[place:], other[place:]
    for skips, runs, skipped, order, last in (
        (rank, 0, first_rest, other_rest, first_last[place:]),
        (0, rank, other_rest, first_rest, other_last[place:]),
    ):
        if not order:
            return skips, runs, skipped
        if not skipped or skipped[0] in order:
            continue
        candidates = last if last[:1] == skipped[:1] and order[0] in last else skipped
        if order[0] in candidates:
            return skips, runs, candidates[: candidates.index(order[0])]
    return None


def _place(first: Sequence[int], first_ended: bool, other: Sequence[int], other_ended: bool) -> int | None:
    """Return the place of the first difference; None where both agree as far as they go."""
    for place, (entry, other_entry) in enumerate(zip(first, other, strict=False)):
        if entry != other_entry:
            return place
    if (len(first) > len(other) and other_ended) or (len(other) > len(first) and first_ended):
        return min(len(first), len(other))
    return None


def _inputs_of_one(first: Mapping[str, Any], rank: int, other: Mapping[str, Any]) -> str:
    """Return the inputs that only one of two ranks' batches has, as the end of a sentence; "" if none."""
    if first["number"] != other["number"]:  # one has gone on to another batch
        return ""
    for owner, batch_notes, other_notes in ((0, first, other), (rank, other, first)):
        more = sorted(set(batch_notes["inputs"]) - set(other_notes["inputs"]))
        if more:
            return f"; only the batch of rank {owner} has {', '.join(more)}"
    return ""


def _group(missing: list[str]) -> str:
    """Return the common parent of several names, or the first and their number."""
    if len(missing) == 1:
        return missing[0]
    common = os.path.commonpath([name.replace(".", "/") for name in missing]).replace("/", ".")
    return common or f"{missing[0]} and {len(missing) - 1} more"
