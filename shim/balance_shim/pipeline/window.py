"""Micro-batches in flight: the forward passes of several, one after the other without waiting, then their backwards.

The Trainer calls `training_step` once for each micro-batch and reads its loss. The first call of a chunk runs all of
the chunk; later calls return the losses that are there. A device computes for one micro-batch while those behind it
compute for another, because the host only queues operations: what decides is that nothing waits (`copies`).

Backward passes run oldest first, in calls of their own. Gradients are then added in the same order as without, to the
bit. One backward over the sum of the losses would also overlap, but autograd runs `AccumulateGrad` of a weight once
per backward, after the last micro-batch (torch 2.13): the sum of a chunk's gradients is kept in addition to `.grad`,
which doubles the memory of gradients from the second chunk on, and hooks of gradients would run once per chunk.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import log, state
from ..errors import BalanceError
from ..monitoring.out_of_memory import is_out_of_memory
from ..training import batch_check, crossing, in_flight, portions, repair
from ..training.loss_scale import shares
from ..training.repeated_step import MicroBatch, remembered, run_again, within_a_step
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from .forward_only import postponed_backward
from .host_waits import HostWaits
from .shared_copies import SharedCopies

if TYPE_CHECKING:
    from torch import nn


class StepRuns(NamedTuple):
    """How one call of `training_step` can be run.

    Attributes:
        model: as wrapped as it is in the step.
        counted: whether the Trainer has counted the label tokens of the step.
        forward: runs the script's step of some inputs, and returns its loss.
        perform: does so in as many portions as it takes to fit.
        alone: does so, and repairs a map that does not run.
    """

    trainer: TrainerLike
    model: "nn.Module"
    counted: bool
    forward: Callable[[Any], Any]
    perform: Callable[[Any], Any]
    alone: Callable[[Any], Any]


def begin(trainer: TrainerLike) -> None:
    """Prepare the hooks of the trainer's model, and say why micro-batches are not in flight if they cannot be.

    Raises:
        BalanceError: they cannot, and a number was asked for under `BALANCE_STRICT`.
    """
    setting = state.settings().pipeline
    if setting == "off":
        return
    from .transfer import make_lean  # needs accelerate

    _WINDOW.keep(trainer, Window())
    make_lean(trainer.model)
    reason = in_flight.reason_against(trainer) if setting != 1 else ""
    if reason:
        line = f"BALANCE_PIPELINE={setting}: {reason}; micro-batches run one after the other"
        if state.settings().strict and setting != "auto":
            raise BalanceError(line)
        log.once("warning", line)


def replanned(trainer: TrainerLike) -> None:
    """Blocks may have moved, and got new hooks."""
    if _WINDOW.of(trainer) is not None:
        from .transfer import make_lean

        make_lean(trainer.model)


def fetched(trainer: TrainerLike, samples: Any) -> None:
    """Take note of the micro-batches of the step that begins."""
    window = _WINDOW.of(trainer)
    if window is not None:
        window.begin(samples if isinstance(samples, (list, tuple)) else ())


def run(step: StepRuns, inputs: Any) -> Any:
    """Return the loss of one micro-batch, its gradients and perhaps those of later ones added."""
    window = _WINDOW.of(step.trainer)
    return step.alone(inputs) if window is None else window.run(step, inputs)


class Window:
    """The micro-batches between two optimizer steps."""

    def __init__(self) -> None:
        self._copies = SharedCopies()
        self._is_watched = False
        setting = state.settings().pipeline
        self._most_pieces = setting if isinstance(setting, int) else 1
        self.begin(())

    def begin(self, samples: Sequence[Any]) -> None:
        """Begin an optimizer step of these micro-batches; none if they are not known."""
        self._samples = list(samples)
        self._position = 0
        self._ready: deque[tuple[MicroBatch, Any]] = deque()
        self._done: list[MicroBatch] = []
        self._one_by_one = False

    def run(self, step: StepRuns, inputs: Any) -> Any:
        """Return the loss of the next micro-batch."""
        from .transfer import transferring

        if not self._ready:
            with transferring(self._copies):
                loss = self._next(step, inputs)
            if not self._ready:
                self._position += 1
                return loss
        self._position += 1
        batch, loss = self._ready.popleft()
        self._ran(step, batch)
        return loss

    def _next(self, step: StepRuns, inputs: Any) -> Any:
        """Run a chunk whose losses are ready then, or one micro-batch, and return its loss."""
        chunk = self._chunk(step.trainer, inputs)
        if len(chunk) > 1 and all(_runs_whole(step, sample) for sample in chunk):
            return self._in_flight(step, chunk)
        alone = step.trainer.args.gradient_accumulation_steps == 1 or len(self._samples) == 1
        pieces = _pieces(step, inputs, self._most_pieces) if alone and not self._one_by_one else []
        if pieces:
            return self._split(step, inputs, pieces)
        return self._alone(step, inputs)

    def _chunk(self, trainer: TrainerLike, inputs: Any) -> list[Any]:
        samples = self._samples[self._position : self._position + in_flight.of(trainer)]
        return samples if samples and samples[0] is inputs and not self._one_by_one else [inputs]

    def _alone(self, step: StepRuns, inputs: Any) -> Any:
        batch = remembered(inputs) if len(self._samples) > 1 else None
        loss = step.alone(inputs)
        if batch is not None:
            self._done.append(batch)
        return loss

    def _in_flight(self, step: StepRuns, chunk: Sequence[Any]) -> Any:
        batches: list[MicroBatch] = []
        losses, failure, began = self._tried(step, chunk, batches)
        if failure is None:
            self._ready.extend(zip(batches, losses, strict=True))
            return None
        self._one_by_one = True
        _give_way(step, failure, len(chunk), began)
        if began:
            for before in self._done:
                with within_a_step(step.trainer):
                    run_again(step.perform, before)
        loss = run_again(step.alone, batches[0])
        self._done.append(batches[0])
        return loss

    def _split(self, step: StepRuns, inputs: Any, pieces: Sequence[Any]) -> Any:
        batch = remembered(inputs)
        with shares(step.trainer, len(pieces), step.counted):
            losses, failure, began = self._tried(step, pieces, [])
        if failure is not None:
            self._one_by_one = True
            self._most_pieces = _give_way(step, failure, len(pieces), began)
            return run_again(step.alone, batch)
        self._ran(step, batch)
        return sum(losses[1:], losses[0])

    def _tried(
        self, step: StepRuns, chunk: Sequence[Any], batches: list[MicroBatch]
    ) -> tuple[list[Any], Exception | None, bool]:
        """Return the losses of `chunk`, the error that stopped it, and whether there may be gradients of it by then."""
        from .transfer import Results

        began = False
        losses: list[Any] = []
        results: list[Results] = []
        accelerator = step.trainer.accelerator
        try:
            with postponed_backward(accelerator) as passes:
                for number, inputs in enumerate(chunk):
                    batches.append(remembered(inputs))
                    results.append(Results(number))
                    with self._watching(step.trainer) if number == 1 else nullcontext(), results[-1].forward():
                        losses.append(step.forward(inputs))
            began = True
            passes.reverse()
            for result in results:
                loss, args, kwargs = passes.pop()
                with result.backward():
                    accelerator.backward(loss, *args, **kwargs)
        except Exception as failure:
            passes.clear()
            return [], failure, began
        finally:
            for result in results:
                result.arrive()
        return losses, None, began

    @contextmanager
    def _watching(self, trainer: TrainerLike) -> Iterator[None]:
        """Look, once, for operations that keep forward passes from overlapping."""
        if self._is_watched:
            yield
            return
        self._is_watched = True
        with HostWaits(trainer.args.device) as waits:
            yield
        if waits.place:
            log.once(
                "info",
                f"BALANCE_PIPELINE: {waits.place} reads a value from {waits.device} in each forward pass, which "
                "the next micro-batch waits for; only backward passes overlap",
            )

    def _ran(self, step: StepRuns, batch: MicroBatch) -> None:
        self._done.append(batch)
        repair.ran(step.trainer, batch)
        adaptive = portions.of(step.trainer)
        if adaptive is not None:
            adaptive.ran(step.trainer, batch.inputs)


def _runs_whole(step: StepRuns, inputs: Any) -> bool:
    """Whether a micro-batch is predicted to fit; blocks may move here."""
    adaptive = portions.of(step.trainer)
    if adaptive is not None and adaptive.count > 1:
        return False
    return batch_check.portions_for(step.trainer, inputs, step.counted) == 1


def _pieces(step: StepRuns, inputs: Any, most: int) -> list[Any]:
    """Return at most `most` parts of a micro-batch to have in flight; none where it is not to be split."""
    batch_size = portions.batch_size_of(inputs)
    if most == 1 or not batch_size or batch_size < 2 or in_flight.reason_against(step.trainer):
        return []
    count = min(most, batch_size)
    if not _runs_whole(step, inputs):
        return []
    if not portions.splits_exactly(step.trainer, inputs, count, step.counted):
        log.once(
            "info",
            f"BALANCE_PIPELINE={most}: a batch is not split, because its loss is not known to be a sum over label "
            "tokens that the Trainer counts, with sequences independent of each other; set gradient_accumulation_steps",
        )
        return []
    return portions.split(inputs, batch_size, count)


def _give_way(step: StepRuns, failure: Exception, count: int, began: bool) -> int:
    """Undo what a chunk of `count` micro-batches has left that stopped with `failure`.

    Returns:
        The size of later chunks: as before where the map is repaired in a moment.
    """
    size = count if crossing.is_cross_device(failure) else _smaller(step, failure, count)
    crossing.let_go(failure)
    if began:
        step.model.zero_grad(set_to_none=True)
    portions.free_memory()
    return size


def _smaller(step: StepRuns, failure: Exception, count: int) -> int:
    """Choose a smaller size of chunks than `count`, and return it."""
    size = max(1, count // 2) if is_out_of_memory(failure) else 1
    if is_out_of_memory(failure):
        fault = f"out of memory with {count} micro-batches in flight"
    else:
        fault = f"{count} micro-batches in flight failed ({' '.join(f'{type(failure).__name__}: {failure}'.split())})"
    in_flight.choose(step.trainer, size)
    now = "one micro-batch at a time" if size == 1 else f"{size} in flight"
    log.warning(f"{fault}: {now} from now on; the step is repeated, nothing is lost")
    return size


def _end(trainer: TrainerLike, window: Window) -> None:
    from .transfer import restore

    restore(trainer.model)


_WINDOW: Part[Window] = Part("micro-batches in flight", end=_end, instead="hooks keep the class of the shim")
