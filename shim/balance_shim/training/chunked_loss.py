"""When the steps of a Trainer get deferred logits, so that their loss is computed in chunks."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .. import log, state
from ..logits.head import FULL, deferring
from ..patching.guard import attempt
from ..upstream.trainer import TrainerLike

if TYPE_CHECKING:
    from torch import nn


def wanted(trainer: TrainerLike, placed: bool) -> bool:
    """Return whether `BALANCE_LOSS` asks for chunks here and `trainer` trains in a way that they are known to go with.

    A setup that chunks do not support is logged once. `placed`: whether the shim has placed the model of `trainer`.
    """
    setting = state.settings().loss
    if setting == "full" or (setting == "auto" and not placed):
        return False
    reason = reason_for_full(trainer)
    if reason:
        log.once("info", FULL + reason)
    return not reason


def reason_for_full(trainer: TrainerLike) -> str:
    """Return why the loss of `trainer` stays in full; "" if it need not."""
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed manages the weights"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP shards the weights"
    if getattr(trainer.args, "torch_compile", False):
        return "torch.compile does not see through chunks"
    if trainer.args.n_gpu > 1 and not trainer.is_model_parallel:
        return "torch.nn.DataParallel copies the model to each device"
    return ""


def has_labels(batch: Any) -> bool:
    """Whether a loss is computed from `batch` and labels in it: trainers without labels read the logits."""
    return isinstance(batch, Mapping) and batch.get("labels") is not None


def step_context(
    trainer: TrainerLike, placed: bool, model: "nn.Module", inputs: Any
) -> contextlib.AbstractContextManager[None]:
    """Return the context for a training step of `trainer` with `model`, as wrapped as it is there, and `inputs`."""
    if not has_labels(inputs) or not wanted(trainer, placed):
        return contextlib.nullcontext()
    return deferring_for_a_step(model)


@contextlib.contextmanager
def deferring_for_a_step(model: "nn.Module") -> Iterator[None]:
    """`deferring` for all of a training step: behind it the optimizer changes the head."""
    with deferring(model) as step:
        yield
    if step is not None:  # and nothing has failed
        attempt("computing the retained logits", step.end, instead="they may be those after the step")
