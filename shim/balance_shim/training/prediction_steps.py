"""Prediction steps of a Trainer: replaced for an evaluation, and run in portions of their sequences."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..upstream.trainer import TrainerLike
from . import portions
from .actual_workload import innermost
from .loss_scale import LIBRARIES

PredictionStep = Callable[..., Any]
SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # keys of transformers' LOSS_MAPPING, since 4.46


class CannotJoin(Exception):
    """The outputs of portions cannot be joined to those of the batch."""


class Predicted(NamedTuple):
    """The result of `Trainer.prediction_step`."""

    loss: Any
    logits: Any
    labels: Any


@contextmanager
def replaced(trainer: TrainerLike, around: Callable[[PredictionStep], PredictionStep]) -> Iterator[None]:
    """Have `around(step)` run in place of the trainer's prediction step, whichever class defines that.

    By an attribute of the trainer: `Seq2SeqTrainer` and trainers of users' own override the method.
    """
    own = vars(trainer).get("prediction_step")
    trainer.prediction_step = around(trainer.prediction_step)
    try:
        yield
    finally:
        if own is None:
            vars(trainer).pop("prediction_step", None)
        else:
            trainer.prediction_step = own


def split_exactly(trainer: TrainerLike) -> bool:
    """Whether prediction steps of `trainer` give the same in portions, as far as its class and model tell.

    The step has to be that of transformers, without generation, and the loss one that libraries average over labels.
    A loss that couples sequences (that of a mixture's router) would come out otherwise.
    """
    if getattr(trainer.args, "predict_with_generate", False) or trainer.compute_loss_func is not None:
        return False
    step, loss = (inspect.unwrap(getattr(type(trainer), name)) for name in ("prediction_step", "compute_loss"))
    if _package(step) != "transformers" or _package(loss) not in LIBRARIES:
        return False
    config: Any = getattr(trainer.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return not getattr(text, "output_router_logits", False)


def splits_exactly(trainer: TrainerLike, inputs: Any, count: int) -> bool:
    """Whether `count` portions of `inputs` give the outputs of the batch in one piece."""
    import torch

    batch_size = portions.batch_size_of(inputs)
    if batch_size is None or batch_size < count or not split_exactly(trainer):
        return False
    labels = inputs.get("labels")
    if labels is not None:
        return isinstance(labels, torch.Tensor) and list(trainer.label_names) == ["labels"]
    # Without labels there must be no loss: of a contrastive one, or of start and end positions, the shares are unknown.
    has_loss = bool(inputs.get("return_loss")) or bool(getattr(trainer, "can_return_loss", False))
    return not has_loss and all(inputs.get(name) is None for name in trainer.label_names)


def in_portions(
    trainer: TrainerLike, perform: Callable[[Any], Any], inputs: Mapping[str, Any], count: int, to_host: bool
) -> Predicted:
    """Return the result of `perform(inputs)`, from `count` portions of its sequences.

    Args:
        perform: runs the prediction step on a batch.
        to_host: whether logits and labels of each portion go to the host at once.

    Raises:
        CannotJoin: outputs are not by sequence, or differ in more than their sequences.
    """
    batch_size = portions.batch_size_of(inputs)
    assert batch_size is not None, "splits_exactly was asked"
    parts = portions.split(inputs, batch_size, count)
    predicted = [_moved(Predicted(*perform(part))) if to_host else Predicted(*perform(part)) for part in parts]
    sizes = [portions.batch_size_of(part) or 0 for part in parts]
    logits = _joined([outcome.logits for outcome in predicted], sizes)
    labels = _joined([outcome.labels for outcome in predicted], sizes)
    return Predicted(_mean([outcome.loss for outcome in predicted], _shares(trainer, parts)), logits, labels)


def _moved(predicted: Predicted) -> Predicted:
    from accelerate.utils import send_to_device

    return Predicted(
        predicted.loss, *(send_to_device(output, "cpu") for output in (predicted.logits, predicted.labels))
    )


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _mean(losses: Sequence[Any], shares: Sequence[int]) -> Any:
    """Return the loss of a batch from those of its portions, each the mean over as many labels as `shares` has."""
    if losses[0] is None:
        return None
    if not sum(shares):
        shares = [1] * len(losses)
    return sum(share * loss for share, loss in zip(shares, losses, strict=True) if share) / sum(shares)


def _shares(trainer: TrainerLike, parts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return over how many labels the loss of each portion is a mean."""
    if parts[0].get("labels") is None:
        return [0] * len(parts)
    labels = [part["labels"] for part in parts]
    if labels[0].is_floating_point():
        return [label.numel() for label in labels]
    if labels[0].ndim > 1 and _shifts_labels(trainer):
        labels = [label[..., 1:] for label in labels]
    return [int(label.ne(-100).sum()) for label in labels]


def _shifts_labels(trainer: TrainerLike) -> bool:
    """Whether the loss leaves out the first label of each row, as that of a causal language model does."""
    noted = getattr(trainer, "_loss_shifts_labels", None)  # 5.x counts labels by it
    if noted is not None:
        return bool(noted)
    model = innermost(trainer.model)
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    kind = getattr(model, "loss_type", None)
    if kind is not None:
        return kind in SHIFTING_LOSSES
    return type(model).__name__.endswith((*SHIFTING_LOSSES, "LMHeadModel"))


def _joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return one structure of tensors from those of the portions, which have `sizes` sequences."""
    import torch

    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        if any(part.ndim == 0 or len(part) != size for part, size in zip(parts, sizes, strict=True)):
            raise CannotJoin
        if any(part.shape[1:] != first.shape[1:] for part in parts):
            raise CannotJoin
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts], sizes) for name in first}
    if isinstance(first, (list, tuple)) and len({len(part) for part in parts}) == 1:
        return tuple(_joined(members, sizes) for members in zip(*parts, strict=True))
    raise CannotJoin
