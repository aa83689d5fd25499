"""How the Trainer scales the loss of a micro-batch, and the consequence for the losses of its portions."""

import dis
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..upstream.trainer import TrainerLike
from ..versions import version_of

LOSS_OF_A_STEP_SINCE = (4, 46)  # transformers divides by the label tokens of the whole step, not by micro-batches
DIVIDES_UNCOUNTED_SINCE = (4, 53)  # a loss without labels to count is divided by the accumulation

LIBRARIES = ("transformers", "trl", "swift")  # whose compute_loss is known


def ignores_count(trainer: TrainerLike) -> bool:
    """Whether the script's own `compute_loss` makes a loss of a micro-batch alone, which is taken for one of the step.

    The Trainer adds such losses up without dividing them. To be seen in the code only: it never reads the argument.
    """
    function = inspect.unwrap(type(trainer).compute_loss)
    code = getattr(function, "__code__", None)
    library = getattr(function, "__module__", "").partition(".")[0] in LIBRARIES
    if code is None or library or not taken_for_scaled(trainer, counted=True) or trainer.compute_loss_func is not None:
        return False
    named = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name == "num_items_in_batch" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    read: set[Any] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_"):
            read.update(instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,))
    return not named & read


def taken_for_scaled(trainer: TrainerLike, counted: bool) -> bool:
    """Whether the Trainer takes a loss for one that is divided by the label tokens of the whole step already.

    Losses of portions then add up, if they are.
    """
    version = version_of("transformers")
    if version < LOSS_OF_A_STEP_SINCE:
        return False
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_scaled is not None:
        return bool(is_scaled)
    by_model = trainer.model_accepts_loss_kwargs and (counted or version < DIVIDES_UNCOUNTED_SINCE)
    return bool(by_model or trainer.compute_loss_func is not None)


@contextmanager
def shares(trainer: TrainerLike, count: int, counted: bool) -> Iterator[None]:
    """Weight the loss of each portion by its share, where it is a mean over its own sequences."""
    if taken_for_scaled(trainer, counted):
        yield
        return
    owners: list[tuple[Any, str]] = [(trainer.args, "gradient_accumulation_steps")]
    if version_of("transformers") < LOSS_OF_A_STEP_SINCE:
        owners.append((trainer.accelerator, "gradient_accumulation_steps"))
    elif hasattr(trainer, "current_gradient_accumulation_steps"):
        owners.append((trainer, "current_gradient_accumulation_steps"))
    before = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), value in zip(owners, before, strict=True):
            setattr(owner, name, value * count)
        yield
    finally:
        for (owner, name), value in zip(owners, before, strict=True):
            setattr(owner, name, value)
