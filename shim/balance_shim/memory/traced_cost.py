"""The memory of a block in training, from a trace of the model."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..optimizers import Optimizer
from . import allocation_record
from .allocation_record import Record
from .blocks import Block
from .cost import LAST, BlockCost, Phase
from .peak import Schedule
from .workload import Workload

if TYPE_CHECKING:
    from .tracing.result import Held, Traced


def of_block(
    block: Block, weights: int, traced: "Traced", optimizer: Optimizer, schedule: Schedule
) -> BlockCost | None:
    """Return the cost of `block` from the trace; None if the trace did not reach it."""
    speaker = traced.speaks_for[block.name]
    if speaker not in traced.trained:  # of a part that was not traced
        return None
    held, trained = traced.held.get(speaker), traced.trained[speaker]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if held is None:  # a follower, which has next to nothing
        return BlockCost(weights=weights)
    if not held.ran and (trained or block.role == "tower"):
        return None
    return BlockCost(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer.state_bytes(trained),
        activations=held.kept,
        forward=held.forward,
        backward=held.backward,
        step=optimizer.step_bytes(trained),
        takes=held.takes,
        gives=held.gives if _is_alone(block, traced) else (),
        phases=_phases(held, traced, 0 if schedule.accumulating else gradients) if _is_alone(block, traced) else (),
    )


def _is_alone(block: Block, traced: "Traced") -> bool:
    """Whether `block` was traced itself and speaks for no other, so that its phases are when it computes."""
    speakers = traced.speaks_for
    return sum(speaker == speakers[block.name] for speaker in speakers.values()) == 1


def _phases(held: "Held", traced: "Traced", gradients: int) -> tuple[Phase, ...]:
    """Return the phases of a device; none for a single one, or where they cannot be compared with other blocks'.

    Args:
        gradients: bytes of gradients that appear in the backward pass; they count as the first phase's, whose backward
            pass is the last one.
    """
    if len(held.phases) < 2 or not traced.ranks:
        return ()
    return tuple(
        Phase(
            rank=phase.start,
            activations=phase.kept,
            forward=phase.most_forward,
            backward=phase.most_backward,
            residue=phase.left - (0 if number else gradients),
        )
        for number, phase in enumerate(held.phases)
    )


def record(block: Block, weights: list[int], traced: "Traced", optimizer: Optimizer) -> Record:
    """Return the allocations of `block`, which was traced."""
    speaker = traced.speaks_for[block.name]
    held, trained = traced.held.get(speaker), traced.trained[speaker]
    if held is None:  # a follower: its allocations are among those of the block that it shares a device with
        return Record(weights=tuple(weights))
    return replace(
        allocation_record.record_of(held.phases),
        weights=tuple(weights),
        gradients=tuple(parameter.numel() * parameter.element_size() for parameter in trained),
        state=optimizer.state_tensors(trained),
        step=optimizer.step_tensors(trained),
    )


def of_first_device(traced: "Traced", workload: Workload) -> BlockCost:
    """Return the cost of the device where inputs arrive; its last phase, where outputs return, is behind all blocks.

    The Trainer has the inputs of all micro-batches of a step there at once, until the optimizer has taken it
    (`Trainer.get_batch_samples`, from transformers 4.46 on).
    """
    held = traced.first
    return BlockCost(
        inputs=traced.inputs * workload.accumulation,
        activations=held.kept,
        forward=held.forward,
        backward=held.backward,
        rank=held.phases[-1].start if held.phases and traced.ranks else LAST,
        phases=_phases(held, traced, 0),
        takes=held.takes,
        gives=held.gives,
    )
