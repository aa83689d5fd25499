"""Losses that are a mean over one rank's label tokens, made a mean over those of all ranks.

The Trainer counts the label tokens of all ranks and passes the number to models that accept it. Many models do not
divide by it (BERT, T5, Qwen2.5-VL, and most vision-language models of transformers 4): their loss is the mean of the
rank's own batch. The mean of such means weighs tokens of a rank with few labels more than others, and where the model
accepts the number without using it, the Trainer multiplies loss and gradients by the number of processes as well.

One process takes the mean over the whole batch. Its loss is the sum over the ranks of `own mean * own tokens / all
tokens`. The tokens are those that `torch.nn.functional.cross_entropy` has averaged over.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from ..upstream.trainer import TrainerLike


class Count(torch.Tensor):
    """The number of label tokens, which notes whether anything is computed with it."""

    used = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        counts = [argument for argument in args if isinstance(argument, Count)]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "to" and isinstance(result, torch.Tensor) and not isinstance(result, Count):
            moved = result.as_subclass(Count)
            moved.origin = counts[0].origin  # type: ignore[attr-defined]
            return moved
        if name not in ("to", "__get__"):
            for count in counts:
                count.origin.used = True  # type: ignore[attr-defined]
        return result


def is_averaged(trainer: TrainerLike) -> bool:
    """Return whether the loss of `trainer` is to be the mean over the label tokens of all ranks."""
    arguments = trainer.args
    if not getattr(arguments, "average_tokens_across_devices", False) or arguments.world_size < 2:
        return False
    return not getattr(arguments, "torch_compile", False)  # neither class nor replaced function survives it


def noted(trainer: TrainerLike, count: Any) -> Any:
    """Return `count` so that `corrected` will know whether it was used; unchanged where that does not matter."""
    if not isinstance(count, torch.Tensor) or not _takes_count(trainer):  # an int in transformers 4.46
        return count
    result = count.as_subclass(Count)
    result.origin = result  # type: ignore[attr-defined]
    return result


@contextlib.contextmanager
def counting_targets() -> Iterator[list[torch.Tensor | None]]:
    """Collect the number of targets of each mean that `cross_entropy` computes; None for another kind of result."""
    original: Any = functional.cross_entropy
    numbers: list[torch.Tensor | None] = []

    def cross_entropy(
        input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
        reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Any:  # fmt: skip
        is_plain_mean = weight is None and size_average is None and reduce is None and reduction == "mean"
        numbers.append((target != ignore_index).sum() if is_plain_mean and not target.is_floating_point() else None)
        return original(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    functional.cross_entropy = cross_entropy
    try:
        yield numbers
    finally:
        if functional.cross_entropy is cross_entropy:
            functional.cross_entropy = original


def corrected(trainer: TrainerLike, result: Any, count: Any, numbers: list[torch.Tensor | None]) -> Any:
    """Return the `result` of `compute_loss` as the rank's share of the mean over all ranks. Ranks do this together.

    Args:
        trainer: whose accelerator averages gradients over the ranks.
        result: the loss, or a tuple that begins with it.
        count: of all label tokens, as `noted` has returned it. A loss that was computed with it is right already.
        numbers: of targets, from `counting_targets`. Where they do not tell, ranks have equal weights.
    """
    is_multiplied = count is not None and _takes_count(trainer)  # by the Trainer
    if is_multiplied and not _is_mean(count):
        return result
    loss = result[0] if isinstance(result, tuple) else result
    own = _own(numbers, loss.device)
    processes = trainer.accelerator.num_processes
    weight = _share(own, processes)
    if not is_multiplied:
        weight = weight * processes
    loss = torch.where(own[0] == 0, loss.nan_to_num(), loss) * weight  # a mean of no tokens is not a number
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def of_evaluation(trainer: TrainerLike, result: Any, count: Any) -> Any:
    """Return the `result` of `compute_loss` in an evaluation, whose losses are averaged by sequences afterwards.

    The Trainer multiplies losses by the number of processes there, too, if it has counted tokens.
    """
    if count is None or not _takes_count(trainer) or not _is_mean(count):
        return result
    loss = (result[0] if isinstance(result, tuple) else result) / trainer.accelerator.num_processes
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _is_mean(count: Any) -> bool:
    """Whether a loss is known to have been computed without `count`."""
    return isinstance(count, Count) and not count.used


def _takes_count(trainer: TrainerLike) -> bool:
    return bool(trainer.model_accepts_loss_kwargs or getattr(trainer, "compute_loss_func", None))


def _own(numbers: list[torch.Tensor | None], device: Any) -> torch.Tensor:
    """Return two integers: the number of targets that each mean of this rank has, and 1; (1, 0) where it is not one."""
    if not numbers or any(number is None for number in numbers):
        return torch.tensor([1, 0], device=device)
    stacked = torch.stack([number.to(device) for number in numbers if number is not None])
    same = (stacked == stacked[0]).all().long()
    return torch.stack([stacked[0] * same + (1 - same), same])


def _share(own: torch.Tensor, processes: int) -> torch.Tensor:
    """Return the part of all ranks' targets that is this rank's; an equal part where some rank has none to tell."""
    import torch.distributed as dist

    total = own.clone()
    if processes > 1 and dist.is_initialized():
        dist.all_reduce(total)
    return torch.where(total[1] == processes, own[0] / total[0], torch.tensor(1 / processes, device=own.device))
