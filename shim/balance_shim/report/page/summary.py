"""The head of the page: what was run, how it went, the most important figures; and at its end the machine."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...units import format_size
from ..folder import RunFolder
from ..texts import PAGE, WORKLOAD
from . import findings


def of(run: RunFolder) -> dict[str, Any]:
    """Return title, verdict and tiles."""
    plan = run.plans[0] if run.plans else None
    names = _machine(run)
    model = plan.model_class if plan is not None else str(run.run.get("model") or PAGE["unknown_model"])
    verdict, css = _verdict(run)
    started = float(run.run.get("started") or 0)
    facts = [str(run.run.get("program") or "")]
    if plan is not None:
        facts.append(f"{_count(plan.parameters)} {PAGE['parameters']}")
    if run.run.get("mode"):
        facts.append(f"BALANCE_MODE={run.run['mode']}")
    if started:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started))
        facts.append(PAGE["started"].format(date=when))
    return {
        "title": f"{model}, {names}" if names else model,
        "facts": [fact for fact in facts if fact],
        "verdict": verdict,
        "css": css,
        "tiles": [tile for tile in (_fullest(run), _deviation(run), *_times(run)) if tile is not None],
    }


def machine(run: RunFolder) -> dict[str, Any]:
    """Return the tables of devices, host, versions, workload, settings and notes."""
    info = run.run
    plan = run.plans[0] if run.plans else None
    workload: Mapping[str, Any] = plan.workload if plan is not None else info.get("workload") or {}
    host = {
        PAGE["platform"]: info.get("platform"),
        PAGE["cores"]: info.get("cores"),
        PAGE["host_memory"]: _size(info.get("host_memory")),
        PAGE["runtime"]: info.get("runtime"),
        PAGE["processes"]: info.get("ranks"),
    }
    libraries = info.get("libraries") or {}
    versions = {"balance_shim": info.get("balance_shim"), "python": info.get("python"), **libraries}
    return {
        "known": bool(info),
        "devices": _cards(info.get("devices") or ()),
        "host": {name: value for name, value in host.items() if value},
        "versions": {name: value for name, value in versions.items() if value},
        "workload": {
            WORKLOAD[name]: _plain(value) for name, value in workload.items() if name in WORKLOAD and value is not None
        },
        "settings": info.get("settings") or {},
        "notes": plan.notes if plan is not None else (),
    }


def seconds(value: float) -> str:
    """Return a duration for people: "1.20 s", "350 ms"."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"


def median_step(run: RunFolder) -> float | None:
    """Return the median of the seconds of the finished steps of the first rank, without the first; None: no steps."""
    steps = [step for step in run.records[0].steps if not step.unfinished] if run.records else []
    times = [step.seconds for step in (steps[1:] or steps)]
    return statistics.median(times) if times else None


def _verdict(run: RunFolder) -> tuple[str, str]:
    kinds = findings.kinds(run)
    for kind, key in (
        ("kept", "verdict_growth"), ("out of memory", "verdict_oom"), ("does not fit", "verdict_unfit"),
    ):  # fmt: skip
        if kind in kinds:
            return PAGE[key], "bad"
    if kinds & set(findings.PROBLEMS):
        return PAGE["verdict_attention"], "bad"
    if not run.records and run.run.get("on_accelerator") is False:
        return PAGE["verdict_unmeasured"], "neutral"
    return PAGE["verdict_good"], "good"


def _machine(run: RunFolder) -> str:
    """Return the devices in short: "4 x NVIDIA A100 (79.1 GiB)"."""
    cards: dict[str, int] = {}
    for entry in run.run.get("devices") or ():
        if isinstance(entry, Mapping):
            size = _size(entry.get("total"))
            name = f"{entry['card']} ({size})" if entry.get("card") else size
            cards[name] = cards.get(name, 0) + 1
    if not cards and run.plans:
        for device in run.plans[0].devices:
            name = format_size(device.capacity)
            cards[name] = cards.get(name, 0) + 1
    names = " + ".join(f"{count} \u00d7 {name}" for name, count in cards.items())
    return f"{names}, {PAGE['simulated']}" if names and run.run.get("simulated") else names


def _fullest(run: RunFolder) -> dict[str, str] | None:
    how = PAGE["measured"]
    peaks = [
        (record.highest("peak").get(name, 0), total, name)
        for record in run.records
        for name, total in record.last("total").items()
        if total
    ]
    if not peaks and run.plans:
        how = PAGE["predicted"]
        peaks = [(device.predicted_peak, device.capacity, device.name) for device in run.plans[0].devices]
    if not peaks:
        return None
    peak, total, name = max(peaks, key=lambda entry: entry[0] / entry[1])
    note = PAGE["fullest_of"].format(
        size=format_size(peak), total=format_size(total), share=f"{peak / total:.0%}", how=how
    )
    return {"label": PAGE["fullest"], "value": name, "note": note}


def _deviation(run: RunFolder) -> dict[str, str] | None:
    gaps = []
    for record in run.records:
        if record.steps and record.steps[-1].unfinished:  # what was predicted was not reached
            return None
        measured = record.highest("peak")
        gaps += [
            ((measured.get(name, 0) - predicted) / predicted, name)
            for name, predicted in record.last("predicted").items()
            if predicted
        ]
    if not gaps:
        return None
    share, name = max(gaps, key=lambda gap: abs(gap[0]))
    return {"label": PAGE["deviation"], "value": f"{share:+.1%}", "note": name}


def _times(run: RunFolder) -> list[dict[str, str]]:
    """Return the tiles of time: measured, or predicted where the devices are simulated or nothing was measured."""
    median, count = median_step(run), len(run.records[0].steps) if run.records else 0
    predicted = run.plans[0].step_time if run.plans else None
    simulated = bool(run.run.get("simulated"))
    tiles = []
    if median is not None and not (simulated and predicted is not None):
        note = PAGE["step_simulated" if simulated else "step_measured"].format(count=count)
        if predicted is not None:
            note += "; " + PAGE["step_predicted"].format(seconds=seconds(predicted.seconds))
        tiles.append({"label": PAGE["step_time"], "value": seconds(median), "note": note})
        tokens = sum(step.tokens for record in run.records for step in record.steps)
        spent = sum(step.seconds for step in run.records[0].steps)
        if tokens and spent and not simulated:
            tiles.append({"label": PAGE["tokens"], "value": f"{tokens / spent:,.0f}", "note": PAGE["measured"]})
    elif predicted is not None:
        tiles.append({"label": PAGE["step_time"], "value": seconds(predicted.seconds), "note": PAGE["predicted"]})
        if predicted.tokens_per_second:
            rate = f"{predicted.tokens_per_second:,.0f}"
            tiles.append({"label": PAGE["tokens"], "value": rate, "note": PAGE["predicted"]})
    return tiles


def _cards(devices: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the table without empty columns: simulated devices of no kind have no product's name."""
    header = [PAGE["device"], PAGE["card"], PAGE["total"], PAGE["capability"]]
    columns = zip(header, *(_card(device) for device in devices if isinstance(device, Mapping)), strict=True)
    used = [column for column in columns if any(column[1:])]
    heads = [column[0] for column in used]
    return {"header": heads, "rows": [list(row) for row in zip(*(column[1:] for column in used), strict=True)]}


def _card(card: Mapping[str, Any]) -> list[str]:
    capability = card.get("capability")
    return [
        str(card.get("name", "")),
        str(card.get("card", "")),
        _size(card.get("total")),
        ".".join(map(str, capability)) if isinstance(capability, list) else "",
    ]


def _size(value: Any) -> str:
    """Return a number of bytes for people; "" for anything else, which a damaged file may have."""
    return format_size(value) if isinstance(value, int | float) and 0 < value < 1 << 63 else ""


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return PAGE["yes"] if value else PAGE["no"]
    return str(value)
