"""The base of all modes that train: the training aids and the memory monitor, which combine with any of them."""

from .. import log, state
from ..monitoring import trainer_callback
from ..patching.guard import attempt, insist
from ..placement import placed_models
from ..report import run_record
from ..training import checkpointing, micro_batch, precision
from ..training.actual_workload import innermost
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike
from .base import Mode


class Training(Mode):
    """A mode that trains."""

    def before_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """Adjust `TrainingArguments` to the variables of the training aids."""
        insist("BALANCE_PRECISION", precision.adjust_arguments, arguments)
        insist("BALANCE_GRADIENT_CHECKPOINTING", checkpointing.adjust_arguments, arguments)
        insist("BALANCE_MICRO_BATCH", micro_batch.adjust_arguments, arguments)

    def after_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """Remember the arguments, most likely those of the model to come."""
        attempt("recording the TrainingArguments", placed_models.remember_arguments, arguments)

    def begin(self, trainer: TrainerLike) -> None:
        """Arm the aids and the monitor for the model that `trainer` has now."""
        instead = "the script decides which layers are recomputed"
        attempt("activation checkpointing", _checkpoint, trainer, instead=instead)
        attempt("preparing micro-batches", micro_batch.begin, trainer, instead="they stay as they are")
        attempt("recording the training", _record, trainer, instead="the report has no workload")
        attempt("watching memory", _monitor, trainer, instead="memory is not monitored")


def _checkpoint(trainer: TrainerLike) -> None:
    placed = placed_models.placed(trainer.model)
    if placed is None:
        checkpointing.arrange(trainer, innermost(trainer.model), None)
    else:
        checkpointing.arrange(trainer, placed[0], placed[1].plan)


def _record(trainer: TrainerLike) -> None:
    report = state.settings().report
    if report not in ("text", "off") and log.is_first_process():
        run_record.add_training(report, innermost(trainer.model), trainer.args)


def _monitor(trainer: TrainerLike) -> None:
    placed = placed_models.placed(trainer.model)
    trainer_callback.begin(trainer, None if placed is None else placed[1].plan)
