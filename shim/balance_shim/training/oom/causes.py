"""Why memory ran out: the differences from the plan."""

from ...language.message import Message
from ...monitoring.diagnosis import LONG_BATCH
from ...units import format_size
from .scene import Scene, beyond_prediction, had_room

HELD_BY_OTHERS = 0.1  # of a device: what is worth a line
UNUSED = 0.1
UNEXPLAINED = 0.1


def causes(scene: Scene) -> list[str]:
    """Return the observed differences from the plan, a line each."""
    causes: list[str] = []
    reading, total = scene.readings[scene.failed], scene.meter.totals[scene.failed]
    if reading.others and reading.others >= HELD_BY_OTHERS * total:
        causes.append(
            Message(
                "cause: other processes use {size} of the {total} of {device}",
                size=format_size(reading.others),
                total=format_size(total),
                device=scene.name,
            )
        )
    paged = scene.meter.paged.get(scene.meter.indices[scene.failed], 0)
    if paged >= HELD_BY_OTHERS * total:
        causes.append(
            Message(
                "cause: up to {size} of {device} are paged optimizer state, which torch does not count",
                size=format_size(paged),
                device=scene.name,
            )
        )
    batch = scene.place.batch
    if scene.planned is not None and batch.seq_len:
        planned = scene.planned.workload
        if batch.tokens > planned.tokens:
            causes.append(
                Message(
                    "cause: this micro-batch has {rows} x {tokens} tokens, the plan was for {planned}{assumed}",
                    rows=batch.batch_size,
                    tokens=batch.seq_len,
                    planned=f"{planned.batch_size} x {planned.seq_len}",
                    assumed=Message(", assumed") if planned.guessed else "",
                )
            )
    if scene.largest_before and batch.elements >= LONG_BATCH * scene.largest_before:
        times = batch.elements / scene.largest_before
        causes.append(Message("cause: this micro-batch is {times} times as large as any before", times=f"{times:.1f}"))
    unused = reading.reserved - reading.allocated
    if unused >= UNUSED * total:
        causes.append(
            Message(
                "cause: {size} of {device} are reserved by the allocator and cannot be used (fragmentation); "
                "PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9) usually ends "
                "that",
                size=format_size(unused),
                device=scene.name,
            )
        )
    if scene.kept is not None:
        causes.append(
            Message(
                "cause: tensors have been retained since step {step}, {rate} per step; their owner is named above",
                step=scene.kept.step,
                rate=format_size(scene.kept.rate),
            )
        )
    elif scene.planned is not None and scene.planned.is_users and had_room(scene):
        causes.append(Message("cause: the map that was given is wrong for this training; see below"))
    beyond = beyond_prediction(scene)
    if not causes and beyond >= UNEXPLAINED * total:
        causes.append(
            Message(
                "cause: unknown; {size} more than predicted is in use on {device}. "
                "BALANCE_MONITOR=1 shows what grows from step to step",
                size=format_size(beyond),
                device=scene.name,
            )
        )
    return causes
