"""How many micro-batches of a Trainer are in flight at the same time (`BALANCE_PIPELINE`), and why only one is.

Which micro-batches: those of an accumulation, which the Trainer fetches before it runs the first (`get_batch_samples`).
Their losses are normalized over all of them, so nothing is split and nothing changes.
"""

import inspect
from collections.abc import Callable
from typing import Any

from .. import log, state
from ..memory.workload import in_equal_chunks, sizes_of_chunks
from ..placement import placed_models
from ..training_run import Part
from ..upstream.trainer import TrainerLike
from ..versions import version_of
from .loss_scale import LOSS_OF_A_STEP_SINCE

# `training_step` of these does no more than transformers' own, unless activations are offloaded.
_KNOWN_STEPS = frozenset(f"{name}Trainer.training_step" for name in ("SFT", "DPO", "KTO", "Reward"))
_COUNT: Part[int] = Part("micro-batches in flight")


def of(trainer: TrainerLike) -> int:
    """Return how many micro-batches of `trainer` are in flight; 1 where no more can be."""
    if state.settings().pipeline == "off":
        return 1
    chosen = _COUNT.of(trainer)
    if chosen is not None:
        return chosen
    setting = state.settings().pipeline
    return in_equal_chunks(setting, window_of(trainer)) if isinstance(setting, int) else 1


def choose(trainer: TrainerLike, count: int) -> None:
    """Have `count` micro-batches of `trainer` in flight from now on."""
    _COUNT.keep(trainer, count)


def window_of(trainer: TrainerLike) -> int:
    """Return the most micro-batches of `trainer` that can be in flight without splitting one."""
    if version_of("transformers") < LOSS_OF_A_STEP_SINCE or reason_against(trainer):
        return 1
    return trainer.args.gradient_accumulation_steps


def take_largest(trainer: TrainerLike, fits: Callable[[], bool]) -> None:
    """Choose the most micro-batches in flight with which a training of `trainer` fits; one if it never does."""
    window = window_of(trainer)
    sizes = sizes_of_chunks(window)[::-1]
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        choose(trainer, sizes[middle])
        low, high = (middle, high) if fits() else (low, middle - 1)
    choose(trainer, sizes[low])
    if window > 1:
        log.info(f"BALANCE_PIPELINE=auto: {sizes[low]} of {window} micro-batches of a step in flight")


def reason_against(trainer: TrainerLike) -> str:
    """Return why `trainer` runs its micro-batches one after the other; "" if it need not."""
    arguments: Any = trainer.args
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    placed = placed_models.placed(trainer.model)
    if placed is None or len(set(placed[1].plan.device_map.values())) < 2:
        return "the model does not span several devices under a map of the shim"
    if arguments.world_size > 1:
        return "several processes train together"
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        return "DeepSpeed or FSDP runs the backward pass"
    if getattr(arguments, "torch_compile", False):
        return "torch.compile does not see through transfers"
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        return f"optimizer {optimizer} takes its steps within the backward pass"
    return _reason_in_step(trainer)


def _reason_in_step(trainer: TrainerLike) -> str:
    """Return what in `training_step` of the trainer's class depends on one micro-batch after the other."""
    function = inspect.unwrap(type(trainer).training_step)  # type: ignore[attr-defined]
    library = getattr(function, "__module__", "").partition(".")[0]
    if library == "transformers":
        return ""
    if library == "trl" and function.__qualname__ in _KNOWN_STEPS:
        return "activations are offloaded" if getattr(trainer.args, "activation_offloading", False) else ""
    return f"{function.__qualname__} may depend on one micro-batch after the other"
