"""The results as one page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from balance_shim.units import MIB


def page(content: Mapping[str, Any]) -> str:
    """Return the page for what `gpu-check.json` holds."""
    lines = [f"# GPU check at {content['commit']}", ""]
    for name, result in content["parts"].items():
        lines += [f"## {name} ({result['status']}, {result['seconds']} s)", ""]
        if result["records"]:
            lines += _table(result["records"])
        if name in ("truth", "stages"):
            lines += _errors(result["records"])
        if result["errors"]:
            lines += ["```", result["errors"].strip(), "```", ""]
    return "\n".join(lines)


def _table(records: list[Mapping[str, Any]]) -> list[str]:
    flat = [dict(_flattened(record)) for record in records]
    columns = list(dict.fromkeys(name for record in flat for name in record))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_shown(name, record.get(name)) for name in columns)} |" for record in flat]
    return [*lines, ""]


def _flattened(record: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if name == "terms":
            continue  # in the JSON file
        if isinstance(value, Mapping):
            yield from ((f"{name} {inner}", figure) for inner, figure in value.items())
        else:
            yield name, value
    if record.get("predicted") and record.get("allocated"):
        yield "error", f"{record['predicted'] / record['allocated'] - 1:+.1%}"


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= MIB:
        return f"{value / MIB:.1f} MiB"
    if isinstance(value, float):
        return f"{value * 1000:.3f} ms" if name.endswith("seconds") else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")[:300]


def _errors(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the line on how true the predictions are."""
    lines = []
    for predicted, measured in (("predicted", "allocated"), ("predicted_reserved", "reserved")):
        errors = [
            abs(record[predicted] / record[measured] - 1)
            for record in records
            if record.get(predicted) and record.get(measured)
        ]
        if errors:
            lines.append(
                f"{measured}, {len(errors)} cases: median error {median(errors):.1%}, worst {max(errors):.1%}."
            )
    return [*lines, ""] if lines else []
