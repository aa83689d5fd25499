"""One evaluation step of a traced model, and the bytes that each device held in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...virtual.machine import Machine
from ..blocks import anchors
from ..colocation import Constraints
from ..training_case import TrainingCase
from ..workload import Workload
from . import batch, layers, measure, run
from .errors import CannotTrace, TakesTooLong, tracing_errors
from .inputs import supposed_batches
from .machine import tracing
from .model_copy import traced_copy
from .phases import phases_of
from .result import ELSEWHERE, Held


@dataclass(frozen=True)
class Evaluated:
    """The memory of an evaluation step, in bytes.

    Attributes:
        held: block name -> bytes; nothing of `backward`.
        first: where inputs arrive and outputs return to.
        outputs: bytes of the model's outputs, without its loss and those that its config excludes.
    """

    held: dict[str, Held]
    first: Held
    outputs: int


def trace_evaluation(case: TrainingCase, constraints: Constraints) -> Evaluated:
    """Run a forward pass without gradients, each distinct block on a device of its own.

    Args:
        case: batch size and sequence length of its workload are those of the evaluation, and so is its batch.
        constraints: of the blocks, as the trace of a training step has shown them.

    Raises:
        CannotTrace: the model cannot be copied or fails in a dry run.
    """
    with tracing_errors():
        fed = next(iter(supposed_batches(case.model, case.workload))) if case.batch is None else case.batch
        sample = layers.sample(case.model, case.structure)
        try:
            return _traced(case, fed, constraints, sample)
        except TakesTooLong:
            raise
        except CannotTrace:
            if sample.whole:
                raise
        return _traced(case, fed, constraints, layers.everything(case.structure.blocks))


def _traced(case: TrainingCase, fed: Mapping[str, Any], constraints: Constraints, sample: layers.Sample) -> Evaluated:
    blocks = case.structure.blocks
    running = [block for block in blocks if block.name not in sample.left_out]
    devices = measure.a_device_each(case.structure, running, constraints)
    placed = [block.name for block in running if block.kind != "tensor"]
    model, trains, left_out = measure.as_supposed(case, sample.left_out)
    with tracing(1 + max(devices.values())) as machine:
        twin = traced_copy(model, machine, measure.by_prefix(devices), left_out, trains)
        run.place_inputs(twin, {name: devices[name] for name in placed}, machine)
        by_device, outputs = _step(twin, batch.on_first_device(fed, model, machine), case.workload, machine)
        del twin
    first = ELSEWHERE if constraints.on_first else by_device.pop(0)
    leads = anchors(running)
    held = {
        block.name: by_device.pop(devices[block.name], ELSEWHERE)
        for position, block in reversed(list(enumerate(running)))
        if leads[position] == position
    }
    speakers = {block.name: held.get(sample.speaks_for[block.name], ELSEWHERE) for block in blocks}
    return Evaluated(speakers, first, outputs)


def _step(
    model: nn.Module, fed: Mapping[str, Any], workload: Workload, machine: Machine
) -> tuple[dict[int, Held], int]:
    run.prepare(model, workload, supposed=False)
    model.eval()
    before = run.live(machine)
    run.reset(machine)
    with torch.no_grad(), machine.ledger.recording() as record:  # and full logits: only training steps defer them
        loss, outputs = run.evaluated(model, fed, workload, machine)
        forward, left = run.peaks(machine), run.live(machine)
    phases = phases_of(record, len(record))
    held = {
        index: Held(
            forward=forward[index] - before[index],
            kept=left[index] - before[index],
            backward=0,
            ran=forward[index] > before[index],
            phases=tuple(phases.get(index, ())),
        )
        for index in range(len(machine.devices))
    }
    config: Any = getattr(model, "config", None)
    ignored = getattr(config, "keys_to_ignore_at_inference", None) or ["past_key_values"]
    size = _bytes(outputs, frozenset([*ignored, "loss"]))
    del loss, outputs
    return held, size


def _bytes(outputs: Any, ignored: frozenset[str]) -> int:
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, Mapping):
        return sum(_bytes(value, ignored) for name, value in outputs.items() if name not in ignored)
    if isinstance(outputs, (list, tuple)):
        return sum(_bytes(value, ignored) for value in outputs)
    return 0
