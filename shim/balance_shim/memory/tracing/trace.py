"""Trace the memory of each block: of the model as a whole, or else of its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks import Block
from ..workload import Workload
from . import parts
from .errors import CannotTrace, TakesTooLong, tracing_errors
from .inputs import supposed_batches
from .measure import trace_with
from .model_copy import Trains
from .result import Traced


def trace(
    model: nn.Module,
    blocks: Sequence[Block],
    workload: Workload,
    trains: Trains = None,
    real_batch: Mapping[str, Any] | None = None,
    loss_on_first: bool = False,
) -> Traced:
    """Run a training step of `model` on shapes, each distinct block once and on a device of its own.

    Args:
        trains: which parameters get gradients; None: what `workload.tuning` supposes.
        real_batch: what the model gets in training, on any device; None: what its config suggests.
        loss_on_first: whether what comes behind the layers has to be where inputs arrive.

    Raises:
        CannotTrace: the model cannot be copied or fails in a dry run.
    """
    with tracing_errors():
        if real_batch is not None:
            return trace_with(model, blocks, workload, trains, real_batch, loss_on_first)
        try:
            return _trace_supposed(model, blocks, workload, trains, loss_on_first)
        except TakesTooLong:
            raise
        except CannotTrace as error:
            whole = error
        return parts.trace_parts(model, blocks, workload, trains, loss_on_first, whole)


def _trace_supposed(
    model: nn.Module, blocks: Sequence[Block], workload: Workload, trains: Trains, loss_on_first: bool
) -> Traced:
    """Trace `model` fed with the first of the supposed batches that it runs on."""
    reasons: list[CannotTrace] = []
    for fed in supposed_batches(model, workload):
        try:
            return trace_with(model, blocks, workload, trains, fed, loss_on_first)
        except TakesTooLong:
            raise
        except CannotTrace as error:
            reasons.append(error)
    raise reasons[0]
