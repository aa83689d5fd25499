"""A plan for people (on standard error) and for programs (JSON in the folder of `BALANCE_REPORT`)."""

import json
import os
from collections.abc import Collection

from .. import log, map_file
from ..language.message import Joined, Message
from ..language.speaker import Say, english
from ..map_file import DeviceMap
from ..memory.cost import TERMS, TRACED
from ..placement.plan import Plan
from ..units import MIB, format_alike, format_size, gib
from .table import table

WORTH_SAYING = 256 * 1024**2  # bytes


def show(plan: Plan, report: str, files: int | None = None, number: int = 1) -> int | None:
    """Log the plan as `BALANCE_REPORT` asks: "text", "off", or a folder for files beside the text.

    Args:
        files: the number of the files of an earlier plan for the same model; None: there are none.
        number: of the model among those in use; from 2 on the heading has it, so that a reference model or a teacher
            is not taken for the one that trains.

    Returns the number of the files, which is `files` where those of an earlier plan for the same model are replaced;
    None where none were written.
    """
    if report == "off" or not log.is_first_process():
        return None
    title = {"balanced": "balanced map", "map": "the user's map", "auto": "map"}[plan.mode]
    assumed = "; assumed until the Trainer is known" if plan.workload.guessed else ""
    headline = (
        f"{title} for {plan.model_class}{_ordinal(number)} ({_count(plan.parameters)} parameters), predicted for "
        f"{plan.workload.describe()}{assumed} (GiB):"
    )
    remarks = [plan.method] if plan.method not in ("", TRACED) else []
    remarks += plan.notes if plan.is_ours else ()
    log.info("\n  ".join([f"{headline}\n{plan_table(plan)}", *remarks]))
    return None if report == "text" else write(plan, report, files)


def plan_table(plan: Plan, say: Say = english) -> str:
    """Return a table in GiB: each device's blocks, predicted peak by term, and its allocator's reserved memory."""
    largest = max(max(device.predicted_peak, device.capacity) for device in plan.devices)
    rows = []
    for device in plan.devices:
        sizes = [*(device.terms[term] for term in TERMS), device.predicted_peak, device.capacity]
        figures = [gib(size, largest) for size in sizes]
        reserved = device.predicted_reserved
        figures += [f"{device.filled:.0%}", "-" if reserved is None else gib(reserved, largest)]
        rows.append([device.name, say(summary(plan.device_map, device.device.index)), *figures])
    header = ["device", "blocks", *TERMS, "peak", "capacity", "used", "reserved"]
    return table([say(word) for word in header], rows, left=2)


def workload_comparison(assumed: Plan, actual: Plan, waits: bool = False) -> str:
    """Return how the actual workload differs from the assumed one, and a table of both predicted peaks.

    Args:
        waits: whether the first batch decides.
    """
    differing = assumed.workload.differences(actual.workload)
    unseen = (
        f"; sequence length unknown, assuming {actual.workload.seq_len} tokens"
        f"{' until the first batch' if waits else '; set BALANCE_SEQ_LEN'}"
        if actual.workload.guessed
        else ""
    )
    if not differing:
        worst = format_size(actual.worst.predicted_peak)
        return f"the Trainer's workload is as planned; fullest device {worst}{unseen}"
    changes = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in differing.items())
    pairs = list(zip(assumed.devices, actual.devices, strict=True))
    largest = max(max(before.predicted_peak, after.predicted_peak, after.capacity) for before, after in pairs)
    rows = []
    for before, after in pairs:
        sizes = [gib(size, largest) for size in (before.predicted_peak, after.predicted_peak, after.capacity)]
        rows.append([before.name, *sizes, f"{after.filled:.0%}"])
    peaks = table(["device", "as planned", "as trained", "capacity", "used"], rows)
    differs = f"the Trainer's workload differs from the plan ({changes}){unseen}"
    return f"{differs}; predicted peaks (GiB):\n{peaks}"


def worst_devices(after: Plan, before: Plan) -> str:
    """Return the fullest device of one plan in comparison with that of another, in words.

    By how full they are where their capacities differ: a larger device may hold more and be less full.
    """
    now, then = after.worst, before.worst
    sizes = format_alike(now.predicted_peak, then.predicted_peak)
    if now.capacity == then.capacity:
        return f"{sizes[0]} instead of {sizes[1]}"
    return f"{now.filled:.0%} full ({sizes[0]} on {now.name}) instead of {then.filled:.0%} ({sizes[1]} on {then.name})"


def summary(device_map: DeviceMap, device: int | str) -> str:
    """Return the blocks of a device in short: runs of numbered layers as "layers.0-7", other names by their last part.

    By more of their name where that is the same for several: "encoder.block.0-2", "decoder.block.0-2".
    """
    paths = {name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name for name in device_map}
    parts: list[str] = []
    run: tuple[str, int, int] | None = None
    for name in [name for name, place in device_map.items() if place == device]:
        stem, _, last = name.rpartition(".")
        if last.isdigit():
            if run is not None and run[0] == stem and run[2] == int(last) - 1:
                run = (stem, run[1], int(last))
                parts[-1] = _run(run, paths)
            else:
                run = (stem, int(last), int(last))
                parts.append(_run(run, paths))
        else:
            run = None
            parts.append(_short(name, paths) or Message("the whole model"))
    if not parts:
        return Message("nothing")
    if len(parts) <= 4:
        return parts[0] if len(parts) == 1 else ", ".join(parts)
    return Message("{names}, {number} more", names=", ".join(parts[:3]), number=len(parts) - 3)


def _ordinal(number: int) -> str:
    return "" if number == 1 else f", model {number} in this process"


def _count(parameters: int) -> str:
    billions = parameters / 1e9
    return f"{billions:.1f} B" if billions >= 1 else f"{1000 * billions:.{0 if billions >= 0.01 else 1}f} M"


def _run(run: tuple[str, int, int], paths: Collection[str]) -> str:
    stem, first, last = run
    numbers = f"{first}" if first == last else f"{first}-{last}"
    return f"{_short(stem, paths)}.{numbers}"


def _short(path: str, paths: Collection[str]) -> str:
    """Return as many of the last parts of `path` as tell it from the others of `paths`."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        ending = ".".join(parts[-depth:])
        if sum(f".{other}".endswith(f".{ending}") for other in paths) <= 1:
            return ending
    return path


def write(plan: Plan, folder: str, number: int | None = None) -> int | None:
    """Write plan and map into `folder` and return the number of these files; a second model of the same run gets 2."""
    try:
        os.makedirs(folder, exist_ok=True)
        if number is None:
            existing = os.listdir(folder)
            number = 1 + sum(name.startswith("device_map") and name.endswith(".json") for name in existing)
        suffix = f"-{number}" if number > 1 else ""
        with open(os.path.join(folder, f"plan{suffix}.json"), "w", encoding="utf-8") as file:
            json.dump(plan.to_json(), file, indent=2)
        map_file.write(plan.device_map, os.path.join(folder, f"device_map{suffix}.json"))
        return number
    except OSError as error:
        log.warning(f"BALANCE_REPORT={folder}: cannot be written ({error.strerror}); the plan is not saved")
        return None


def chunks_line(saved: tuple[str, int]) -> str:
    """Return the line on the result of `remedies.saved_by_chunks`; "" if that is not worth a line."""
    name, size = saved
    if size < WORTH_SAYING:
        return ""
    return Message("BALANCE_LOSS=chunked would save {size} on {device}", size=format_size(size), device=name)


def precision_line(precision: str, dtype: str, saved: dict[str, int]) -> str:
    """Return the line on the savings of `remedies.saved_by_precision` by term; "" where there are none.

    Args:
        dtype: in which the script would have loaded.
    """
    terms = {term: size for term, size in saved.items() if abs(size) >= MIB}
    if not terms:
        return ""
    parts = ", ".join(f"{term} {'' if size > 0 else '-'}{format_size(abs(size))}" for term, size in terms.items())
    total = sum(terms.values())
    does = f"saves {format_size(total)}" if total >= 0 else f"takes {format_size(-total)} more"
    return f"BALANCE_PRECISION={precision} instead of {dtype} {does} on all devices together: {parts}"


def shortfall_line(plan: Plan, remedies: list[str]) -> str:
    """Return the line on a plan that does not fit: by how much, and the remedies that would fit."""
    scarcest = max(plan.devices, key=lambda device: device.shortfall)
    assumed = Message(" (assuming sequences of {number} tokens)", number=plan.workload.seq_len)
    would = Joined("; ", remedies) if remedies else Message("none of the usual changes alone; more or larger devices")
    needed, capacity, missing = format_alike(scarcest.predicted_peak, scarcest.capacity, plan.shortfall)
    needs = Message("needs {needed} of {capacity}", needed=needed, capacity=capacity)
    if scarcest.predicted_peak - scarcest.capacity < scarcest.shortfall:
        # Its tensors alone may fit: what does not is the allocator's segments, some of which are partly empty.
        reserved, available = scarcest.predicted_reserved or 0, scarcest.device.available
        reserved_text, available_text, missing = format_alike(reserved, available, plan.shortfall)
        needs = Message(
            "has tensors of {tensors}, for which its allocator needs to reserve {reserved} of {available}",
            tensors=format_size(scarcest.predicted_peak),
            reserved=reserved_text,
            available=available_text,
        )
    return Message(
        "predicted not to fit{guess}: {device} {needs}, {missing} too much. What would fit: {remedies}",
        guess=assumed if plan.workload.guessed else "",
        device=scarcest.name,
        needs=needs,
        missing=missing,
        remedies=would,
    )
