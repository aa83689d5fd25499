"""The Trainer under ZeRO-3: what is checked once DeepSpeed's engine stands."""

import os
from typing import Any

from .. import log
from ..errors import BalanceError
from ..units import format_size


def prepare(trainer: Any) -> None:
    """Have the engine checked as soon as training has been set up."""
    from transformers import TrainerCallback

    if any(type(each).__name__ == "ZeroCheck" for each in trainer.callback_handler.callbacks):
        return

    class ZeroCheck(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            check(trainer.model_wrapped)

    trainer.add_callback(ZeroCheck())


def check(engine: Any) -> None:
    """Compare what DeepSpeed's engine does with what was asked for.

    Raises:
        BalanceError: it is not ZeRO-3, or not over all processes.
    """
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    if stage != 3:
        raise BalanceError(f"BALANCE_MODE=zero3: the Trainer has {_what(engine, stage)} instead of ZeRO-3")
    wanted = int(os.environ["WORLD_SIZE"])
    if engine.world_size != wanted:
        raise BalanceError(
            f"BALANCE_MODE=zero3: DeepSpeed sees {engine.world_size} processes, and {wanted} were started; each would "
            "train a model of its own (report this with the output of `balance-shim doctor`)"
        )
    log.once("info", f"ZeRO-3 over {wanted} processes; each holds {format_size(share(engine.module))} of weights")


def share(model: Any) -> int:
    """Return the bytes of the parameters of `model` that this process holds."""
    tensors = [getattr(each, "ds_tensor", each) for each in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _what(engine: Any, stage: int | None) -> str:
    return "no DeepSpeed engine" if stage is None else f"stage {stage}"
