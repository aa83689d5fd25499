"""Losses that are a mean of their own rows, although the Trainer believes that they count the tokens of all ranks.

It multiplies the loss by the number of processes wherever the model takes any keyword, to undo the division by the
count of all ranks. Models such as BERT and T5 take it and divide by nothing: their losses and gradients would be those
of one process, times the number of processes.
"""

from typing import Any

import torch


class Count(torch.Tensor):
    """The number of label tokens, which notes whether anything is computed with it."""

    used = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        found = [each for each in args if isinstance(each, Count)]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "to" and isinstance(result, torch.Tensor) and not isinstance(result, Count):
            moved = result.as_subclass(Count)
            moved.origin = found[0].origin  # type: ignore[attr-defined]
            return moved
        if name not in ("to", "__get__"):
            for each in found:
                each.origin.used = True  # type: ignore[attr-defined]
        return result


def noted(trainer: Any, count: Any) -> Any:
    """Return `count` so that `corrected` will know whether it was used; as it is where that does not matter."""
    arguments = trainer.args
    scaled = getattr(arguments, "average_tokens_across_devices", False) and arguments.world_size > 1
    if not scaled or getattr(arguments, "torch_compile", False) or not isinstance(count, torch.Tensor):
        return count
    if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return count
    found = count.as_subclass(Count)
    found.origin = found  # type: ignore[attr-defined]
    return found


def corrected(trainer: Any, result: Any, count: Any) -> Any:
    """Return what `compute_loss` has returned, with the loss of one process where `count` was not used."""
    if not isinstance(count, Count) or count.used:
        return result
    processes = trainer.accelerator.num_processes
    if isinstance(result, tuple):
        return (result[0] / processes, *result[1:])
    return result / processes
