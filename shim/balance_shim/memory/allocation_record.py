"""The allocations and frees of one block in a training step, as a trace has recorded them.

Records are data: `replay` runs them on a model of the allocator, and profiles store them in the cache as JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..virtual.allocator_settings import CUDA

if TYPE_CHECKING:
    from .tracing.phases import TracedPhase


@dataclass(frozen=True)
class Record:
    """The allocations of one block in a training step; all numbers in bytes but for frees.

    Attributes:
        weights: each tensor that is loaded.
        gradients: one for each parameter that trains.
        state: the tensors that the optimizer keeps from its first step on.
        step: temporaries of the optimizer's step.
        forward: allocations (bytes, from 0) and frees (-1 - number of the allocation) in order.
        backward: the same in the backward pass, with the numbering going on. Without gradient accumulation what is
            never freed are the gradients.
        later: (forward, backward) of each phase but the first one; the numbering goes through all of them, forward and
            then in reverse.
        evaluation: the events of each phase when a batch is evaluated, with a numbering of their own.
    """

    weights: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    state: tuple[int, ...] = ()
    step: tuple[int, ...] = ()
    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()
    later: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    evaluation: tuple[tuple[int, ...], ...] = ()

    @property
    def phases(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """(forward, backward) of each phase."""
        return ((self.forward, self.backward), *self.later)


NO_RECORD = Record()


def record_of(phases: "Sequence[TracedPhase]") -> Record:
    """Return the record of a device's allocations in a trace, without weights and optimizer."""
    if not phases:
        return NO_RECORD
    first, *later = ((tuple(phase.forward), tuple(phase.backward)) for phase in phases)
    return Record(forward=first[0], backward=first[1], later=tuple(later))


@lru_cache(maxsize=256)
def parameter_sizes(record: Record) -> frozenset[int]:
    """Return the bytes of allocations that have the size of a parameter or gradient of the record's block."""
    return frozenset(-(-size // CUDA.granule) * CUDA.granule for size in (*record.weights, *record.gradients))


@lru_cache(maxsize=256)
def gradients_among(record: Record) -> tuple[frozenset[int], tuple[int, ...]]:
    """Return the numbers of the allocations that become gradients in a first micro-batch, and the sizes of the rest.

    The record is of a later micro-batch, whose gradients are added to those that are there and freed. Of all that has
    the size of a parameter the last ones are taken: gradients of tied weights become one when all have arrived.
    """
    by_size: dict[int, list[int]] = {}
    number = sum(event >= 0 for forward, _ in record.phases for event in forward)
    for _, backward in reversed(record.phases):
        for event in backward:
            if event >= 0:
                by_size.setdefault(event, []).append(number)
                number += 1
    numbers_of_gradients, missing = set(), []
    for size in record.gradients:
        numbers = by_size.get(-(-size // CUDA.granule) * CUDA.granule, [])
        if numbers:
            numbers_of_gradients.add(numbers.pop())
        else:
            missing.append(size)
    return frozenset(numbers_of_gradients), tuple(missing)


def to_json(records: Sequence[Record | None]) -> dict[str, Any]:
    """Return `records` with each distinct one written once: most layers are alike."""
    distinct = list(dict.fromkeys(record for record in records if record is not None))
    numbers = {record: number for number, record in enumerate(distinct)}
    return {
        "distinct": [astuple(record) for record in distinct],
        "numbers": [None if record is None else numbers[record] for record in records],
    }


def from_json(content: Mapping[str, Any]) -> tuple[Record | None, ...]:
    """Return the records that `to_json` has been called on."""
    distinct = [_record_from(fields) for fields in content["distinct"]]
    return tuple(None if number is None else distinct[number] for number in content["numbers"])


def _record_from(fields: Sequence[Any]) -> Record:
    *sizes, later, evaluation = fields
    phases = tuple((tuple(forward), tuple(backward)) for forward, backward in later)
    return replace(Record(*map(tuple, sizes)), later=phases, evaluation=tuple(map(tuple, evaluation)))
