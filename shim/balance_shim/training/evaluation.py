"""The evaluation that a Trainer will run: its batch, its outputs, and those that accumulate on a device."""

from collections.abc import Mapping
from typing import Any, Literal

from ..memory.evaluation import Evaluation
from ..memory.workload import Workload
from ..upstream.trainer import TrainerLike
from .longest_batch import longest_batch


def evaluation_of(trainer: TrainerLike, workload: Workload) -> tuple[Evaluation | None, Mapping[str, Any] | None]:
    """Return the evaluation of `trainer`, and its largest batch as far as that can be seen without effects.

    There is none without a data set to evaluate on, nor while nobody knows how long sequences are.

    Args:
        workload: what the trainer trains with; its sequence length counts where the evaluation's cannot be seen.
    """
    datasets = _datasets(getattr(trainer, "eval_dataset", None))
    if not datasets:
        return None, None
    size = int(trainer.args.per_device_eval_batch_size)
    batches = [longest_batch(trainer, size, dataset) for dataset in datasets]
    readable = [batch for batch in batches if batch is not None]
    batch = max(readable, key=_elements) if len(readable) == len(batches) else None
    if batch is None and workload.guessed:
        return None, None
    shape = tuple(getattr(None if batch is None else batch.get("input_ids"), "shape", ()))
    batch_size, tokens = shape if len(shape) == 2 else (size, workload.seq_len)
    loss_only = trainer.compute_metrics is None  # as `Trainer.evaluate` has it
    return evaluation_with(trainer, int(batch_size), int(tokens), loss_only, _longest(datasets, size)), batch


def evaluation_with(
    trainer: TrainerLike, batch_size: int, tokens: int, loss_only: bool, dataset_size: int
) -> Evaluation:
    """Return the evaluation of `dataset_size` sequences in batches of `batch_size` x `tokens`.

    Args:
        loss_only: whether the evaluation loop is asked for the loss alone.
    """
    joined = bool(getattr(trainer.args, "eval_do_concat_batches", True))
    return Evaluation(
        batch_size,
        tokens,
        _returns(trainer, loss_only),
        _accumulated_sequences(trainer, dataset_size, batch_size),
        joined,
    )


def _datasets(datasets: Any) -> list[Any]:
    if isinstance(datasets, Mapping):
        return [dataset for dataset in datasets.values() if dataset is not None]
    return [] if datasets is None else [datasets]


def _longest(datasets: list[Any], size: int) -> int:
    """Return the number of samples of the longest data set; unknown for those without a length."""
    return max([len(dataset) for dataset in datasets if hasattr(dataset, "__len__")], default=size)


def _returns(trainer: TrainerLike, loss_only: bool) -> Literal["loss", "logits", "reduced"]:
    arguments = trainer.args
    if arguments.prediction_loss_only or loss_only:
        return "loss"
    if getattr(arguments, "predict_with_generate", False):
        return "reduced"  # tokens
    if getattr(trainer, "preprocess_logits_for_metrics", None) is not None:
        return "reduced"
    return "logits"


def _accumulated_sequences(trainer: TrainerLike, dataset_size: int, size: int) -> int:
    """Return the number of sequences whose outputs accumulate on the device, in batches of `size`."""
    arguments = trainer.args
    every = arguments.eval_accumulation_steps
    if getattr(arguments, "batch_eval_metrics", False):
        every = 1
    return dataset_size if every is None else min(dataset_size, size * max(1, int(every)))


def _elements(batch: Mapping[str, Any]) -> int:
    return max((value.numel() for value in batch.values() if hasattr(value, "numel")), default=0)
