"""Run a micro-batch in portions of its sequences, with the same loss and gradients."""

import gc
import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .. import devices, log, state
from ..monitoring.out_of_memory import is_out_of_memory
from ..replicas import together
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from .loss_scale import LIBRARIES, ignores_count, shares, taken_for_scaled

if TYPE_CHECKING:
    from torch import nn

Inputs = Mapping[str, Any]
Run = Callable[[Any, Inputs], Any]


def of(trainer: TrainerLike) -> "Portions | None":
    """Return the runner of the micro-batches of `trainer`; None where `BALANCE_MICRO_BATCH` is not set, or cannot act.

    Replicas that ran out of memory in a backward pass may have sent some of their gradients already.
    """
    if state.settings().micro_batch is None:
        return None
    if trainer.args.world_size > 1:
        log.once("info", "BALANCE_MICRO_BATCH: with several processes a step that runs out of memory is not repeated")
        return None
    return _PORTIONS.of(trainer) or _PORTIONS.keep(trainer, Portions())


def forget(trainer: TrainerLike) -> None:
    """Drop the step that an earlier training of `trainer` was in when it ended."""
    _PORTIONS.drop(trainer)


class Portions:
    """Runs the micro-batches of a trainer in as many portions as it takes not to run out of memory.

    A micro-batch that runs out of memory may have left gradients of some parameters. So all gradients of the step are
    thrown away, and what it had of micro-batches is run again, in portions of half the size, from then on.
    """

    def __init__(self) -> None:
        self.count = 1
        self._done: list[Inputs] = []  # of this optimizer step
        self._counted = False

    def run(
        self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs, counted: bool, least: int = 1
    ) -> Any:
        """Return the loss of one micro-batch, its gradients added.

        Args:
            run: runs forward and backward pass of some of the sequences, and returns their loss.
            counted: whether the Trainer has counted the label tokens of the step.
            least: the number of portions that this one is predicted to take.

        Raises:
            Exception: what `run` raises; of an out-of-memory the first one, if the sequences cannot be divided.
        """
        self._counted = counted
        self.count = max(self.count, least)
        try:
            loss = self._as_it_fits(trainer, run, model, inputs)
        except BaseException:
            self._done = []  # the Trainer may begin anew, with smaller batches
            raise
        self.ran(trainer, inputs)
        return loss

    def ran(self, trainer: TrainerLike, inputs: Inputs) -> None:
        """Take note of a micro-batch of the step that has run in another way."""
        ended = bool(trainer.accelerator.sync_gradients)
        self._done = [] if ended else [*self._done, inputs]

    def _as_it_fits(self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs) -> Any:
        again: list[Inputs] = []
        while True:
            try:
                for before in again:
                    self._in_portions(trainer, run, model, before)
                return self._in_portions(trainer, run, model, inputs)
            except Exception as failure:
                if not is_out_of_memory(failure) or not self._can_halve(trainer, inputs):
                    raise
            # Out of the handler, so that nothing holds the tensors of the pass that failed.
            self.count *= 2
            again = list(self._done)
            model.zero_grad(set_to_none=True)
            free_memory()
            log.warning(
                f"out of memory: micro-batches of {batch_size_of(inputs)} sequences run in {self.count} portions from "
                "now on; the step is repeated, nothing is lost",
                "portions",
            )

    def _can_halve(self, trainer: TrainerLike, inputs: Inputs) -> bool:
        batch_size = batch_size_of(inputs)
        return (
            batch_size is not None
            and batch_size >= 2 * self.count
            and _is_divisible(trainer, inputs, 2 * self.count, self._counted)
        )

    def _in_portions(self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs) -> Any:
        return run_in_portions(trainer, run, model, inputs, self.count, self._counted)


_PORTIONS: Part[Portions] = Part("portions of micro-batches")


def run_in_portions(
    trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs, count: int, counted: bool
) -> Any:
    """Return the loss of a micro-batch run in `count` portions, its gradients added, or in one if it is too small."""
    batch_size = batch_size_of(inputs)
    if count == 1 or batch_size is None or batch_size < count:
        return run(model, inputs)
    *earlier, last = split(inputs, batch_size, count)
    with shares(trainer, count, counted):
        wrapped: Any = model  # `no_sync` is of `DistributedDataParallel`
        with wrapped.no_sync() if together.is_wrapped(model) else nullcontext():
            losses = [run(model, portion) for portion in earlier]
        losses.append(run(model, last))  # replicas add up the gradients of all portions
    return sum(losses[1:], losses[0])


def splits_exactly(trainer: TrainerLike, inputs: Inputs, count: int, counted: bool) -> bool:
    """Whether `count` portions give the result of the micro-batch in one piece, also if no setting asks for them.

    Then the loss has to be the sum over label tokens that the libraries divide by those of the step. A loss between
    sequences (contrastive, or that of a mixture's router) or statistics of a batch would come out otherwise.
    """
    batch_size = batch_size_of(inputs)
    if batch_size is None or batch_size < count or not counted or not _is_divisible(trainer, inputs, count, counted):
        return False
    if state.settings().micro_batch is not None:
        return True
    function = inspect.unwrap(type(trainer).compute_loss)
    if getattr(function, "__module__", "").partition(".")[0] not in LIBRARIES or trainer.compute_loss_func is not None:
        return False
    return inputs.get("labels") is not None and not _couples_sequences(trainer.model)


def _couples_sequences(model: "nn.Module") -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "output_router_logits", False)) or any(
        isinstance(module, _BatchNorm) for module in model.modules()
    )


def batch_size_of(inputs: Inputs) -> int | None:
    """Return the number of sequences of a batch in which every value has one entry per sequence; None for any other."""
    if not isinstance(inputs, Mapping) or any(isinstance(value, Mapping) for value in inputs.values()):
        return None
    sizes = {len(value) for value in inputs.values() if _has_batch_dimension(value)}
    return sizes.pop() if len(sizes) == 1 else None


def split(inputs: Inputs, batch_size: int, count: int) -> list[dict[str, Any]]:
    """Return `count` batches of nearly equal size that together hold the sequences of `inputs`."""
    edges = [batch_size * place // count for place in range(count + 1)]
    return [
        {name: value[first:last] if _has_batch_dimension(value) else value for name, value in inputs.items()}
        for first, last in itertools.pairwise(edges)
    ]


def _has_batch_dimension(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def _is_divisible(trainer: TrainerLike, inputs: Inputs, count: int, counted: bool) -> bool:
    """Whether portions give the loss of the micro-batch: losses add up, or all portions have as many labels."""
    if taken_for_scaled(trainer, counted):
        return counted and not ignores_count(trainer)
    batch_size, labels = batch_size_of(inputs), inputs.get("labels")
    if batch_size is None or batch_size % count or not hasattr(labels, "ne"):
        return False
    counts = {int(portion["labels"].ne(-100).sum()) for portion in split(inputs, batch_size, count)}
    return len(counts) == 1


def free_memory() -> None:
    """Release memory held by reference cycles, and torch's cached memory."""
    import torch

    gc.collect()
    kind = devices.accelerator_type()
    if kind is not None:
        torch.get_device_module(kind).empty_cache()
