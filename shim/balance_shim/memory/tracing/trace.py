"""Trace the memory of each block: of the model in one run, or else of its parts."""

from ..training_case import TrainingCase
from . import parts
from .errors import CannotTrace, TakesTooLong, tracing_errors
from .inputs import supposed_batches
from .measure import trace_with
from .result import Traced


def trace(case: TrainingCase) -> Traced:
    """Run a training step of `case` on shapes, each distinct block once and on a device of its own.

    Raises:
        CannotTrace: the model cannot be copied or fails in a dry run.
    """
    with tracing_errors():
        if case.batch is not None:
            return trace_with(case, case.batch)
        try:
            return _trace_supposed(case)
        except TakesTooLong:
            raise
        except CannotTrace as error:
            failure = error
        return parts.trace_parts(case, failure)


def _trace_supposed(case: TrainingCase) -> Traced:
    """Trace the model with the first of the batches derived from its config on which it runs."""
    reasons: list[CannotTrace] = []
    for fed in supposed_batches(case.model, case.workload):
        try:
            return trace_with(case, fed)
        except TakesTooLong:
            raise
        except CannotTrace as error:
            reasons.append(error)
    raise reasons[0]
