"""`torch.nn.DataParallel`, which the Trainer puts around any model of one device when CUDA has several.

A model that the shim has placed is not to be copied to the other devices: nothing of its plan would hold. With a map
over several devices the Trainer knows that by itself, with a map of one device it does not.
"""

from inspect import signature
from typing import Any

from .. import log
from ..placement import placed_models
from ..upstream.trainer import TrainingArgumentsLike


def prevent(init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have a trainer that is being made for a placed model train one copy of it.

    Not later: the trainer computes its batch size from the number of copies, and TRL refuses more than one.

    Args:
        init: `Trainer.__init__`, with the arguments that it is called with (`self` first).
    """
    bound = signature(init).bind_partial(*args, **kwargs).arguments
    model, arguments = bound.get("model"), bound.get("args")
    placed = placed_models.placed(model) if model is not None and hasattr(model, "modules") else None
    if placed is None or arguments is None or arguments.world_size > 1:
        return
    copies = arguments.n_gpu
    if copies > 1:
        if placed_models.had_no_map(placed[0]):
            _say_other_batch(arguments, copies)
        arguments._n_gpu = 1


def _say_other_batch(arguments: TrainingArgumentsLike, copies: int) -> None:
    """Tell that a script without a device map would have trained with another batch."""
    batch_size, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    log.once(
        "warning",
        f"without BALANCE_INTERCEPT=none this script would train {copies} copies of the model (torch.nn.DataParallel), "
        f"{copies * batch_size * accumulated} sequences per step; balanced, it trains one copy, "
        f"{batch_size * accumulated} per step; gradient_accumulation_steps={copies * accumulated} keeps "
        "the number of sequences per step",
    )
