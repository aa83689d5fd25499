"""The problems and changes of a run, with their remedies."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..folder import Event, RunFolder
from ..texts import FINDINGS, PAGE

# In this order; the rest are messages.
PROBLEMS = (
    "out of memory", "kept", "does not fit", "longer batches", "long batch", "fragmentation", "cache", "occupied",
    "others", "unfinished",
)  # fmt: skip
ACTIONS = ("choice", "repair", "portions", "move")


def of(run: RunFolder) -> dict[str, Any]:
    """Return the problems and actions, the gravest first, and all other messages."""
    events = [*run.events, *_not_in_events(run)]
    unfit = [event for event in events if event.kind == "does not fit"][-1:]  # the last is about what really came
    shown = [
        event
        for kind in (*PROBLEMS, *ACTIONS)
        for event in (unfit if kind == "does not fit" else events)
        if event.kind == kind
    ]
    steps = sum(1 for record in run.records[:1] for _ in record.steps)
    monitored = PAGE["monitored"].format(count=steps) if steps else PAGE["not_monitored"]
    if not steps and run.run.get("on_accelerator") is False:
        monitored = PAGE["no_accelerator"]
    return {
        "list": [_finding(event) for event in shown],
        "messages": [event.text for event in events if event.kind not in (*PROBLEMS, *ACTIONS)],
        "nothing": PAGE["found_nothing"].format(monitored=monitored),
    }


def kinds(run: RunFolder) -> set[str]:
    """Return the kinds of all findings."""
    return {event.kind for event in (*run.events, *_not_in_events(run))}


def marks(run: RunFolder) -> list[tuple[str, int]]:
    """Return (heading, step) of the findings that belong to a step, in the order of the steps."""
    steps = set()
    for event in (*run.events, *_not_in_events(run)):
        step = event.facts.get("since", event.facts.get("step"))
        if event.kind in PROBLEMS and isinstance(step, int) and step > 0:
            steps.add((FINDINGS[event.kind][0], step))
    return sorted(steps, key=lambda mark: mark[1])


def _not_in_events(run: RunFolder) -> Iterator[Event]:
    """Yield findings that only the record of memory has: those of a run without `events.jsonl`, a step that failed."""
    recorded = {(event.kind, str(event.facts.get("since"))) for event in run.events}
    failed = any(event.kind == "out of memory" for event in run.events)
    for record in run.records:
        for step in record.steps:
            for finding in step.findings:
                if (finding.get("kind"), str(finding.get("since"))) not in recorded:
                    yield Event(str(finding.get("kind")), "warning", str(finding.get("text")), 0, record.rank, finding)
        if record.steps and record.steps[-1].unfinished and not failed:
            step_number = record.steps[-1].step
            yield Event("unfinished", "warning", "", 0, record.rank, {"step": step_number})


def _finding(event: Event) -> dict[str, Any]:
    facts: Mapping[str, Any] = event.facts
    heading, advice = FINDINGS.get(event.kind, FINDINGS["message"])
    labels = [
        PAGE[key].format(**{field: value})
        for key, field, value in (
            ("since", "step", facts.get("since")),
            ("at_step", "step", facts.get("step")),
            ("rank", "rank", event.rank or None),
        )
        if value is not None and value != 0
    ]
    rows = facts.get("table")
    return {
        "heading": heading,
        "where": ", ".join(labels),
        "css": "bad" if event.kind in PROBLEMS else "action",
        "text": str(facts.get("headline") or event.text),
        "causes": _texts(facts.get("causes")),
        "table": [_texts(row) for row in rows] if isinstance(rows, list) else [],
        "remedies": _texts(facts.get("remedies")) or ([advice] if advice else []),
    }


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []
