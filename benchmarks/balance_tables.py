"""The results of balance.py as Markdown tables, and beside the demands that are made on the shim."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from balance_cases import GIB, MACHINES, METHODS, WORKLOADS, Case, Machine, Results, shown, worst_fill
from models import MODELS, Model


def tables(results: Results) -> str:
    parts = []
    for name, machine in MACHINES.items():
        rows = list(_rows(results, name))
        if rows:
            parts.append(_balance_table(machine, rows))
    parts += [_verdict(results), _truth_table(results)]
    return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Row:
    """The results of one model and workload on one machine, by method."""

    model: Model
    workload: str
    machine: str
    by_method: dict[str, dict[str, Any]]

    def fill(self, method: str) -> float | None:
        """Return the fill of the fullest device."""
        result = self.by_method.get(method)
        if result is None or result["status"] != "ok":
            return None
        return worst_fill(result["peaks"], MACHINES[self.machine].sizes)

    def ratio(self, method: str, other: str) -> float | None:
        fill, other_fill = self.fill(method), self.fill(other)
        return None if fill is None or other_fill is None else fill / other_fill

    def unevenness(self, method: str) -> float | None:
        """Return the worst fill over the mean fill (all bytes over all sizes)."""
        fill = self.fill(method)
        if fill is None:
            return None
        return fill / (sum(self.by_method[method]["peaks"]) / GIB / sum(MACHINES[self.machine].sizes))


def _rows(results: Results, machine: str) -> Iterator[Row]:
    for model in MODELS.values():
        for workload in WORKLOADS:
            results_of = {method: results.get(Case(model, workload, machine, method)) for method in METHODS}
            by_method = {method: result for method, result in results_of.items() if result is not None}
            if by_method:
                yield Row(model, workload, machine, by_method)


def _balance_table(machine: Machine, rows: list[Row]) -> str:
    methods = [method for method in METHODS if any(method in row.by_method for row in rows)]
    columns = ["model", "training", *methods, "shim max/mean", "shim/auto"]
    has_search = "search" in methods
    columns += ["shim/search"] * has_search
    lines = []
    for row in rows:
        cells = [row.model.name, WORKLOADS[row.workload].title]
        for method in methods:
            fill, status = row.fill(method), row.by_method.get(method, {}).get("status", "")
            cells.append(status if fill is None else shown(fill, machine, row.model))
        cells += [_number(row.unevenness("shim")), _number(row.ratio("shim", "auto"))]
        cells += [_number(row.ratio("shim", "search"), 3)] * has_search
        lines.append(cells)
    if machine.is_even:
        title = f"{machine.title}: peak of the fullest device, GiB"
    else:
        larger = ", ".join(f"x{model.machine_scale} for {model.name}" for model in MODELS.values())
        title = f"{machine.title} GiB: fill of the fullest device. The sizes are multiplied to suit the model: {larger}"
    return f"**{title}**\n\n{_markdown(columns, lines)}"


def _verdict(results: Results) -> str:
    """Return the demands that are made on the shim, each with what was found."""
    rows = [row for name in MACHINES for row in _rows(results, name)]
    lines = []

    def demand(text: str, values: dict[str, float], limit: float) -> None:
        if values:
            over = [f"{place} {value:.3f}" for place, value in values.items() if value > limit]
            count = f"{len(values) - len(over)} of {len(values)}"
            lines.append(f"* {text}: {count}" + (f"; not: {', '.join(over)}" if over else ""))

    def every(figure: Callable[[Row], float | None]) -> dict[str, float]:
        figures = {f"{row.model.name}/{row.workload}/{row.machine}": figure(row) for row in rows}
        return {place: value for place, value in figures.items() if value is not None}

    demand("fullest device no fuller than under `auto`", every(lambda row: row.ratio("shim", "auto")), 1.0)
    demand("within 3 % of the best map found by search", every(lambda row: row.ratio("shim", "search")), 1.03)
    demand("max/mean at most 1.05", every(lambda row: row.unevenness("shim")), 1.05)
    demand("the same, or no map that search found has a fullest device emptier by 1 %", every(_as_blocks_allow), 1.05)
    return "\n".join(lines)


def _as_blocks_allow(row: Row) -> float | None:
    """Return max/mean, or 1 where search found no better map: some blocks are too large to be evened out."""
    uneven, over_search = row.unevenness("shim"), row.ratio("shim", "search")
    return 1.0 if over_search is not None and over_search < 1.01 else uneven


_WHOSE = {
    "shim": "the shim's maps",
    "shim-chunked": "the shim's maps, loss in chunks",
    "shim-untold": "the shim's maps, nothing told",
}


def _truth_table(results: Results) -> str:
    """Return how far predicted peaks are from simulated ones in training, by kind of model and by who made the map."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for key, result in results.by_key.items():
        name, _, _, method = key.split("/")
        if result["status"] != "ok" or not result.get("predicted") or method == "search":
            continue
        kind = "vision-language" if MODELS[name].is_vision else "text"
        map_kind = _WHOSE.get(method, "other maps")
        least = 0.01 * max(result["peaks"])  # a device that is all but empty says nothing
        for device, (predicted, simulated) in enumerate(
            zip(result["predicted"], result["training_peaks"], strict=True)
        ):
            if simulated > least:
                groups.setdefault((map_kind, kind), []).append(
                    (abs(predicted - simulated) / simulated, f"{key} device {device}")
                )
    rows = []
    for (map_kind, kind), errors in sorted(groups.items(), reverse=True):
        worst, place = max(errors)
        median = statistics.median(error for error, _ in errors)
        rows.append([map_kind, kind, str(len(errors)), f"{median:.1%}", f"{worst:.1%}", place])
    if not rows:
        return ""
    columns = ["map", "models", "devices", "median error", "worst error", "where"]
    return f"**Predicted against simulated peak of each device**\n\n{_markdown(columns, rows)}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    left = [all(not cell[:1].isdigit() for cell in cells) for cells in zip(*rows, strict=True)]
    rule = ["---" if is_left else "---:" for is_left in left]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, rule, *rows])


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
