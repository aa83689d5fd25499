"""An optimizer that the script passes to its Trainer: transformers discards it when DeepSpeed trains."""

from typing import Any

from ..upstream.trainer import TrainerLike


def keep(trainer: TrainerLike) -> None:
    """Have `trainer` train with the optimizer and scheduler that the script has passed to it.

    `deepspeed_init` (transformers 4.45 to 5.23) sets both to None and makes new ones, since it may run twice.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        return
    if optimizer is not None and "create_optimizer" not in vars(trainer) and not _is_engines(optimizer):
        parameters = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
        trained = False

        def create_optimizer(*_: Any, **__: Any) -> Any:
            nonlocal trained
            if trained:  # DeepSpeed has put its own tensors into the groups
                optimizer.state.clear()
                for group, first in zip(optimizer.param_groups, parameters, strict=True):
                    group["params"] = list(first)
            trained = True
            trainer.optimizer = optimizer
            return optimizer

        trainer.create_optimizer = create_optimizer
    if scheduler is not None and "create_scheduler" not in vars(trainer) and _is_scheduler_of(scheduler, optimizer):

        def create_scheduler(*_: Any, **__: Any) -> Any:
            trainer.lr_scheduler = scheduler
            return scheduler

        trainer.create_scheduler = create_scheduler


def _is_engines(optimizer: Any) -> bool:
    """Whether an earlier training of this trainer has made it."""
    return type(optimizer).__module__.startswith(("accelerate.", "deepspeed."))


def _is_scheduler_of(scheduler: Any, optimizer: Any) -> bool:
    return optimizer is not None and getattr(scheduler, "optimizer", None) is optimizer
