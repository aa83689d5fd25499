"""The memory that a device's caching allocator reserves in training: the traced allocations, replayed on its model.

In a trace each block has a device of its own, so the order of allocations and frees on a device is that of a block. For
the blocks of a real device these records follow each other: forward in the order of the blocks, backward in reverse. A
block that computes at several times of a pass has several phases, with those of other blocks in between.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from ..units import MIB
from ..virtual.allocator import CachingAllocator, NoRoom
from ..virtual.allocator_blocks import Block
from ..virtual.allocator_settings import CUDA, AllocatorSettings, Geometry
from .allocation_record import NO_RECORD, Record, gradients_among, parameter_sizes

STEPS = 3  # at most; the reserved memory mostly no longer grows after the second one
EVALUATIONS = 2
VARIED_STEPS = 6  # with sequences of several lengths, ahead of those with the longest
GOLDEN_RATIO = 0.618
WHOLE_BATCHES = 2  # at either end of an evaluation
MOST_BATCHES = 64  # of an evaluation whose outputs are added up one by one
BUCKET = 25 * MIB  # `bucket_cap_mb` of DDP, by default
MICRO_BATCHES = 2  # of a step with gradient accumulation; later ones are like the second


@dataclass(frozen=True)
class EvaluationRun:
    """Evaluations between training steps.

    Attributes:
        batches: how many batches run until their outputs go to the host.
        outputs: bytes that each of them leaves on the device until then.
        most: bytes that all of them leave; the last batch may have fewer rows.
        joined: whether these are one tensor, which is made anew for each batch.
    """

    batches: int = 1
    outputs: int = 0
    most: int = 0
    joined: bool = True


@dataclass(frozen=True)
class DeviceRun:
    """The records of one device in training, and the schedule to replay them by.

    Attributes:
        blocks: the records of its blocks in the order of the forward pass.
        last: allocations after the blocks in the forward pass: outputs that return to the first device.
        accumulating: whether a step has several micro-batches.
        step_at_once: whether the optimizer takes all tensors together, so that its temporaries exist at one time.
        replicated: whether `DistributedDataParallel` keeps buckets for the gradients.
        order: the phases of blocks and `last` in forward order, as (position, number of the phase); the position of
            `last` is the number of blocks. Empty: all phases of a block at its own place.
        evaluation: the evaluations; None where there are none.
        least: the length of the shortest sequences as a fraction of the longest; 1 if all are of one length.
        in_flight: how many micro-batches go forward before the first of them goes backward.
        in_chunks: whether a step has more micro-batches than that.
    """

    blocks: tuple[Record, ...]
    last: Record = NO_RECORD
    accumulating: bool = False
    step_at_once: bool = False
    replicated: bool = False
    order: tuple[tuple[int, int], ...] = ()
    evaluation: EvaluationRun | None = None
    least: float = 1.0
    in_flight: int = 1
    in_chunks: bool = False


@dataclass(frozen=True)
class Replayed:
    """Peaks of a replay in bytes: in tensors, and reserved. `fits`: whether the device had room for it."""

    allocated: int
    reserved: int
    fits: bool


@lru_cache(maxsize=256)
def replay(run: DeviceRun, limit: int, settings: AllocatorSettings, geometry: Geometry = CUDA) -> Replayed:
    """Return the peaks of `run` on a device of `limit` bytes; without a limit where they do not fit it.

    With a limit the allocator gives cached segments back before it fails, so that less may be reserved than without.
    """
    try:
        return _Replay(run, CachingAllocator(limit, settings, geometry)).peaks(fits=True)
    except NoRoom:
        return _Replay(run, CachingAllocator(settings=settings, geometry=geometry)).peaks(fits=False)


class _Replay:
    def __init__(self, run: DeviceRun, allocator: CachingAllocator) -> None:
        self._run, self._allocator = run, allocator
        self._sequence = (*run.blocks, run.last)
        self._order = run.order or tuple(
            (position, phase) for position, record in enumerate(self._sequence) for phase in range(len(record.phases))
        )
        self._live: list[dict[int, Block]] = [{} for _ in self._sequence]
        self._held = self._peak = 0
        self._lengths = _varied(run.least)
        self._length = 1.0

    def peaks(self, fits: bool) -> Replayed:
        self._load()
        if self._run.replicated:
            self._make_buckets()
        before = -1
        for step in range(VARIED_STEPS if self._run.least < 1 else 0):
            self._training_step(first=step == 0)
        self._lengths = iter(())
        for step in range(STEPS):
            self._training_step(first=step == 0 and self._run.least == 1)
            # The first step is without the optimizer's state.
            if step and self._allocator.peak_reserved == before:
                break
            before = self._allocator.peak_reserved
        for _ in range(EVALUATIONS if self._run.evaluation else 0):
            self._evaluate()
            self._training_step(first=False)
        return Replayed(self._peak, self._allocator.peak_reserved, fits)

    def _training_step(self, first: bool) -> None:
        gradients: list[Block] = []
        if self._run.in_flight > 1:
            for chunk in range(MICRO_BATCHES if self._run.in_chunks else 1):
                self._chunk(gradients if chunk == 0 else None)
        else:
            for micro_batch in range(MICRO_BATCHES if self._run.accumulating else 1):
                self._forward_and_backward(gradients if micro_batch == 0 and self._run.accumulating else None)
        self._optimizer_step(first)
        self._free(gradients)
        self._clear()  # gradients, where they are in the records

    def _clear(self) -> None:
        for live in self._live:
            self._free(live.values())
            live.clear()

    def _load(self) -> None:
        """Load the weights as transformers does: into a block that it has the allocator reserve beforehand."""
        sizes = [size for record in self._sequence for size in record.weights]
        if sum(sizes):
            self._free([self._allocate(sum(sizes))])
        for size in sizes:
            self._allocate(size)

    def _make_buckets(self) -> None:
        """Make the buckets of DDP: parameters from the last to the first, up to 25 MiB each."""
        size = 0
        for gradient in reversed([size for record in self._sequence for size in record.gradients]):
            size += gradient
            if size >= BUCKET:
                self._allocate(size)
                size = 0
        if size:
            self._allocate(size)

    def _chunk(self, gradients: list[Block] | None) -> None:
        """Run the micro-batches that are in flight together; see `_backward` for `gradients`."""
        flights = []
        for _ in range(self._run.in_flight):
            self._live = [{} for _ in self._sequence]
            flights.append((self._live, self._forward(), self._length))
        for number, (self._live, counters, self._length) in enumerate(flights):
            self._backward(counters, gradients if number == 0 else None)

    def _forward_and_backward(self, gradients: list[Block] | None) -> None:
        """Run a micro-batch; see `_backward` for `gradients`."""
        self._backward(self._forward(), gradients)

    def _forward(self) -> list[int]:
        """Run a forward pass, and return how many allocations each record has made."""
        counters = [0] * len(self._sequence)
        self._length = next(self._lengths, 1.0)
        for number, phase in self._order:
            self._play(number, self._sequence[number].phases[phase][0], counters)
        return counters

    def _backward(self, counters: list[int], gradients: list[Block] | None) -> None:
        """Run a backward pass. With `gradients`, of the first of several, gradients that appear are added to them."""
        for number, phase in reversed(self._order):
            record = self._sequence[number]
            if gradients is None:
                self._play(number, record.phases[phase][1], counters)
                continue
            appearing, missing = gradients_among(record)
            if not phase:
                gradients += map(self._allocate, missing)
            gradients += self._play(number, record.phases[phase][1], counters, appearing)
        if self._run.accumulating:
            self._clear()

    def _evaluate(self) -> None:
        """Run the batches of an evaluation: the first and the last ones in full, of the rest the outputs that are kept.

        As in `transformers.trainer_pt_utils.EvalLoopContainer`: outputs are added to those before by a copy of all of
        them, and the loop has a name for those of the last batch.
        """
        run = self._run.evaluation
        assert run is not None
        outputs_so_far: list[Block] = []
        before: list[Block] = []  # the outputs that the loop has a name for
        for number in range(1, run.batches + 1):
            in_full = number <= WHOLE_BATCHES or number > run.batches - WHOLE_BATCHES
            if in_full:
                self._play_evaluation()
            elif number % max(1, run.batches // MOST_BATCHES):
                continue
            outputs = [self._outputs(run.outputs)] if run.outputs else []
            self._clear()
            self._free(before)
            before = []
            if not run.outputs or not run.joined or not outputs_so_far:
                outputs_so_far += outputs
                continue
            joined = self._allocate(min(number * run.outputs, run.most))
            self._free(outputs_so_far)
            outputs_so_far, before = [joined], outputs
        self._free(before)
        self._free(outputs_so_far)

    def _outputs(self, size: int) -> Block:
        """Return `size` bytes of outputs: where the model returns most of them, the tensor that it returned."""
        live = self._live[-1]
        returned = [number for number, block in live.items() if size / 2 <= block.size <= size]
        if returned:
            return live.pop(max(returned, key=lambda number: live[number].size))
        return self._allocate(size)

    def _play_evaluation(self) -> None:
        counters = [0] * len(self._sequence)
        for number, phase in self._order:
            record = self._sequence[number]
            if len(record.evaluation) == len(record.phases):
                self._play(number, record.evaluation[phase], counters)
            elif not phase:
                for events in record.evaluation:
                    self._play(number, events, counters)

    def _play(
        self, number: int, events: Iterable[int], counters: list[int], retained: frozenset[int] = frozenset()
    ) -> list[Block]:
        """Replay `events` of a record; return the allocations `retained`, which are not freed."""
        live, spared = self._live[number], []
        for event in events:
            if event >= 0:
                live[counters[number]] = self._allocate(self._sized(number, event))
                counters[number] += 1
            elif -1 - event in retained:
                spared.append(live.pop(-1 - event))
            else:
                self._free([live.pop(-1 - event)])
        return spared

    def _sized(self, number: int, size: int) -> int:
        """Return the bytes of an allocation of a record in a batch of the present length.

        All allocations grow with the length, except those with the size of a parameter.
        """
        if self._length == 1 or size in parameter_sizes(self._sequence[number]):
            return size
        return int(size * self._length)

    def _optimizer_step(self, first: bool) -> None:
        temporaries: list[Block] = []
        for record in self._sequence:
            if first:
                for size in record.state:
                    self._allocate(size)
        for record in self._sequence:
            for size in record.step:
                temporaries.append(self._allocate(size))
                if not self._run.step_at_once:
                    self._free(temporaries)
                    temporaries.clear()
        self._free(temporaries)

    def _allocate(self, size: int) -> Block:
        block = self._allocator.allocate(max(1, size))
        self._held += block.size
        self._peak = max(self._peak, self._held)
        return block

    def _free(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._held -= block.size
            self._allocator.free(block)


def _varied(least: float) -> Iterator[float]:
    """Yield lengths from `least` to 1, spread evenly, in an order without a trend."""
    return (least + (1 - least) * (number * GOLDEN_RATIO % 1) for number in count(1))
