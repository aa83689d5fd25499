"""Mode `zero3`: several processes, each with a partition of every weight."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .. import devices, state
from ..errors import BalanceError
from ..patching.guard import insist
from ..zero import arguments as zero_arguments
from ..zero import config, loops, moe
from ..zero.launching import relaunch
from ..zero.weights import gathering, loading, saving
from .base import Mode


class Zero3(Mode):
    """Its moments in libraries other than the Trainer and the loading of models."""

    def training_imported(self) -> None:
        """Relaunch here and not at start: only now is this program about training. Later, half its work is done."""
        if state.is_pending():
            return
        try:
            relaunch.ensure_launched()
        except BalanceError as error:
            state.postpone(error)  # to where arguments or a model are made, which ends the program

    def before_arguments(self, arguments: Any) -> None:
        insist("preparing the TrainingArguments for ZeRO-3", zero_arguments.prepare, arguments)

    def after_arguments(self, arguments: Any) -> None:
        insist("taking over the DeepSpeed config", zero_arguments.take_over, arguments)

    def allows_bf16_on_cpu(self) -> bool:
        return True

    def process_backend(self) -> tuple[str, Any] | None:
        if not os.environ.get("LOCAL_RANK", "").isdigit() or devices.accelerator_type() is not None:
            return None
        from accelerate.utils import DistributedType

        return "gloo", DistributedType.MULTI_CPU

    def compiles_shared_memory(self) -> bool:
        return devices.accelerator_type() is not None

    def accelerator_options(self, options: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = insist("preparing an Accelerator for ZeRO-3", loops.with_plugin, options)
        return prepared

    def before_clipping_norm(self, accelerator: Any, max_norm: Any) -> None:
        insist("clipping gradients", loops.check_clipping, accelerator, max_norm)

    def before_clipping_value(self, accelerator: Any) -> None:
        insist("clipping gradients", loops.refuse_clipping_by_value, accelerator)

    def before_engine_config(self, config_of_trainer: Any, model: Any) -> None:
        insist("completing the ZeRO-3 config", config.fill_hidden_size, config_of_trainer.config, model)
        precision = loading.main_dtype(model)
        insist("choosing the precision", loading.adopt_precision, config_of_trainer, precision)
        insist("marking the MoE blocks", moe.mark_leaf_modules, model)

    def after_engine_backward(self) -> None:
        insist("partitioning weights that the loss used", gathering.release)

    def before_engine_step(self) -> None:
        insist("partitioning weights that the script used", gathering.release)

    def after_partition(self, parameter: Any) -> None:
        _give_dimension(parameter)

    def before_regather(self, context: Any) -> None:
        if context.enabled and context.src_rank is not None:
            for parameter in context.params:
                _give_dimension(parameter)

    def merging_adapters(self, model: Any) -> AbstractContextManager[Any]:
        return saving.merging_whole(model) if saving.is_divided(model) else nullcontext()

    def reading_tokens(self, weight: Any) -> AbstractContextManager[bool]:
        return nullcontext(False) if devices.accelerator_type() == "cuda" else _gathered(weight)

    def save_adapters(
        self, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return saving.save(original, model, args, kwargs, trained=True)


ZERO3 = Zero3()


@contextmanager
def _gathered(weight: Any) -> Iterator[bool]:
    from deepspeed import zero

    with zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        yield True


def _give_dimension(parameter: Any) -> None:
    if parameter.data.dim() == 0:
        parameter.data = parameter.data.view(1)
