"""Why memory ran out: what has gone another way than planned."""

from ...monitoring.diagnosis import LONG_BATCH
from ...units import format_size
from .scene import Scene, beyond_prediction, had_room

HELD_BY_OTHERS = 0.1  # of a device: what is worth a line
UNUSED = 0.1
UNEXPLAINED = 0.1


def causes(scene: Scene) -> list[str]:
    """Return what is to be seen to have gone another way than planned, a line each."""
    causes = []
    reading, total = scene.readings[scene.failed], scene.meter.totals[scene.failed]
    if reading.others and reading.others >= HELD_BY_OTHERS * total:
        causes.append(
            f"cause: other processes use {format_size(reading.others)} of the {format_size(total)} of {scene.name}"
        )
    paged = scene.meter.paged.get(scene.meter.indices[scene.failed], 0)
    if paged >= HELD_BY_OTHERS * total:
        causes.append(
            f"cause: up to {format_size(paged)} of {scene.name} are paged optimizer state, which torch does not count"
        )
    batch = scene.place.batch
    if scene.planned is not None and batch.row_tokens:
        planned = scene.planned.workload
        if batch.tokens > planned.tokens:
            causes.append(
                f"cause: this micro-batch has {batch.rows} x {batch.row_tokens} tokens, the plan was for "
                f"{planned.batch_size} x {planned.seq_len}{', assumed' if planned.guessed else ''}"
            )
    if scene.largest_before and batch.elements >= LONG_BATCH * scene.largest_before:
        times = batch.elements / scene.largest_before
        causes.append(f"cause: this micro-batch is {times:.1f} times as large as any before")
    unused = reading.reserved - reading.allocated
    if unused >= UNUSED * total:
        causes.append(
            f"cause: {format_size(unused)} of {scene.name} are reserved by the allocator and cannot be used "
            "(fragmentation); PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9) "
            "usually ends that"
        )
    if scene.kept is not None:
        causes.append(
            f"cause: tensors have been retained since step {scene.kept.step}, "
            f"{format_size(scene.kept.rate)} per step; their owner is named above"
        )
    elif scene.planned is not None and scene.planned.is_users and had_room(scene):
        causes.append("cause: the map that was given is wrong for this training; see below")
    beyond = beyond_prediction(scene)
    if not causes and beyond >= UNEXPLAINED * total:
        causes.append(
            f"cause: unknown; {format_size(beyond)} more than predicted is in use on {scene.name}. "
            "BALANCE_MONITOR=1 shows what grows from step to step"
        )
    return causes
