"""Mode `zero3`: DeepSpeed ZeRO-3, in one of the processes that train."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import devices, state
from ..errors import BalanceError
from ..monitoring import trainer_callback
from ..patching.guard import attempt, insist
from ..training import precision
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike
from ..zero import arguments as zero_arguments
from ..zero import (
    calls,
    config,
    engine,
    loops,
    matrix_optimizers,
    meeting,
    moe,
    multiple_trainers,
    optimizer_state,
    resume,
)
from ..zero.launching import relaunch
from ..zero.weights import gathering, gradients, loading, saving
from .base import Original
from .training import Training

if TYPE_CHECKING:
    from torch import nn


class Zero3(Training):
    """Partitions weights, gradients and optimizer state over all devices."""

    def training_is_near(self) -> None:
        """Become several processes: not at start, as only now the program is about training, and not half-way."""
        if state.is_pending():
            return
        try:
            relaunch.ensure_launched()
        except BalanceError as error:
            state.postpone(error)  # to where arguments or a model are made, which ends the program

    def before_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """Give the arguments the DeepSpeed config."""
        super().before_arguments(arguments)
        insist("preparing the TrainingArguments for ZeRO-3", zero_arguments.prepare, arguments)

    def after_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """Take over the config that the arguments have made of ours."""
        insist("taking over the DeepSpeed config", zero_arguments.take_over, arguments)
        super().after_arguments(arguments)

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load in partitions."""
        kwargs = insist("BALANCE_PRECISION", precision.adjust_loading, kwargs)
        return loading.load(original, cls, args, kwargs)

    def allows_bf16_on_cpu(self) -> bool:
        """Return True: processes on the CPU train on purpose."""
        return True

    def save(self, original: Original, model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Save whole weights, from the first rank."""
        return saving.save(original, model, args, kwargs, trained=False)

    def save_adapters(
        self, original: Original, model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Save whole adapters, from the first rank."""
        return saving.save(original, model, args, kwargs, trained=True)

    def merging_adapters(self, model: "nn.Module") -> AbstractContextManager[Any]:
        """Gather weights where adapters are merged into them."""
        return saving.merging_whole(model) if saving.is_divided(model) else nullcontext()

    def generating(self, model: Any, options: dict[str, Any]) -> AbstractContextManager[Any]:
        """Have ranks meet, unless each generates with a model of its own."""
        is_alone = options.get("synced_gpus") is False and not saving.is_divided(model)
        return nullcontext() if is_alone else calls.generating(model)

    def reading_weight(self, weight: Any) -> AbstractContextManager[Any]:
        """Gather the weight."""
        return _gathered(weight)

    def reading_tokens(self, weight: Any) -> AbstractContextManager[bool]:
        """Gather the weight, except on CUDA, where PEFT's own way works."""
        return nullcontext(False) if devices.accelerator_type() == "cuda" else _gathered(weight)

    def make_accelerator(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let several trainers have an accelerator each."""
        insist("making room for another trainer", multiple_trainers.make_room, trainer)
        result = original(trainer, *args, **kwargs)
        insist("remembering the state of accelerate", multiple_trainers.remember, trainer)
        return result

    def after_optimizer(self, optimizer: Any) -> None:
        """Warn of optimizers that need whole matrices; drop groups without parameters."""
        if not hasattr(optimizer, "param_groups"):
            return
        attempt("looking at the optimizer", matrix_optimizers.warn, optimizer)
        # LoRA leaves one of them empty on 4.x. DeepSpeed drops it, and torch's scheduler then misses it.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def before_training(self, trainer: TrainerLike) -> None:
        """Have DeepSpeed's engine checked, and ranks watched, once it stands."""
        insist("training with several trainers", multiple_trainers.take_over, trainer)
        insist("preparing the training with ZeRO-3", engine.prepare, trainer)
        self.begin(trainer)

    def step(
        self,
        original: Original,
        trainer: TrainerLike,
        model: "nn.Module",
        inputs: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note the modules that this rank runs in a step."""
        trainer_callback.saw_batch(trainer, inputs)
        with engine.watched(trainer, inputs), calls.together():
            return original(trainer, model, inputs, *args, **kwargs)

    def compute_loss(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Have losses that are a mean of this rank's tokens become a mean of all ranks' tokens."""
        from ..zero import mean_loss  # needs torch

        if len(args) > 2 or not mean_loss.is_averaged(trainer):
            return original(trainer, *args, **kwargs)
        count = kwargs.get("num_items_in_batch")
        if count is not None:
            kwargs["num_items_in_batch"] = count = mean_loss.noted(trainer, count)
        if not trainer.model.training:
            return mean_loss.of_evaluation(trainer, original(trainer, *args, **kwargs), count)
        with mean_loss.counting_targets() as numbers:
            result = original(trainer, *args, **kwargs)
        return mean_loss.corrected(trainer, result, count, numbers)

    def evaluate(self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate on all ranks."""
        insist("evaluating with several trainers", multiple_trainers.take_over, trainer)
        meeting.meet("an evaluation or prediction")
        with calls.together():
            return original(trainer, *args, **kwargs)

    def explain_out_of_memory(self, trainer: TrainerLike, failure: BaseException) -> None:
        """Log the remedies that reduce memory under ZeRO-3."""
        engine.explain_out_of_memory(trainer)

    def before_resuming(self, engine: Any, checkpoint: Any) -> None:
        """Convert a checkpoint of another number of processes."""
        optimizer_state.resumes(engine)
        insist("preparing the checkpoint", resume.prepare, engine, checkpoint)

    def before_saving(self, trainer: TrainerLike) -> None:
        """Wait for all ranks, each of which holds a part of the weights."""
        if saving.is_divided(trainer.model):
            meeting.meet("saving the model")

    def after_checkpoint(self) -> None:
        """Wait for the writer: a rank that misses it does not load the best weights in the end, and the others wait."""
        saving.wait_for_all()

    def process_backend(self) -> tuple[str, Any] | None:
        """Have ranks without accelerators be several; accelerate 1.13 takes them for one."""
        if not os.environ.get("LOCAL_RANK", "").isdigit() or devices.accelerator_type() is not None:
            return None
        from accelerate.utils import DistributedType

        return "gloo", DistributedType.MULTI_CPU

    def accelerator_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of an `Accelerator` with DeepSpeed's plugin."""
        options = insist("preparing an Accelerator for ZeRO-3", loops.with_plugin, options)
        return options

    def before_clipping_norm(self, accelerator: Any, max_norm: Any) -> None:
        """Refuse a norm that DeepSpeed, which clips itself, does not have."""
        insist("clipping gradients", loops.check_clipping, accelerator, max_norm)

    def before_clipping_value(self, accelerator: Any) -> None:
        """Refuse it: DeepSpeed clips by norm only."""
        insist("clipping gradients", loops.refuse_clipping_by_value, accelerator)

    def compiles_shared_memory(self) -> bool:
        """Return False on the CPU: compiling takes a minute, and gloo does the same."""
        return devices.accelerator_type() is not None

    def engine_config(self, trainer: TrainerLike) -> Any:
        """Return the config that the trainer's arguments have got from us."""
        return trainer.args.deepspeed

    def before_engine_config(self, hf_config: Any, model: "nn.Module") -> None:
        """Fill in sizes and precision, and mark blocks of experts."""
        insist("completing the ZeRO-3 config", config.fill_hidden_size, hf_config.config, model)
        insist("choosing the precision", loading.adopt_precision, hf_config, loading.main_dtype(model))
        insist("marking the MoE blocks", moe.mark_leaf_modules, model)

    def after_engine_backward(self, engine: Any) -> None:
        """Partition the weights that the loss used outside of their modules; have gradients be read."""
        insist("partitioning weights that the loss used", gathering.release)
        gradients.after_backward(engine)

    def engine_without_sync(self, original: Original, engine: Any) -> Any:
        """Let the engine accumulate by its own count: partitioned gradients are reduced in every backward pass.

        accelerate 1.0 to 1.8, at least, enter `no_sync` at stage 3, too, where the engine refuses it.
        """
        return nullcontext()

    def before_engine_step(self, engine: Any) -> None:
        """Call the callbacks that read gradients, and partition the weights that the script used."""
        gradients.before_step(engine)
        insist("partitioning weights that the script used", gathering.release)

    def after_engine_step(self, engine: Any) -> None:
        """Have gradients be read no more."""
        gradients.after_step(engine)

    def after_partition(self, parameter: Any) -> None:
        """Give a scalar a dimension, without which DeepSpeed cannot send it."""
        _give_dimension(parameter)

    def before_regather(self, context: Any) -> None:
        """Do so again where the script may have changed the parameter."""
        if context.enabled and context.src_rank is not None:
            for parameter in context.params:
                _give_dimension(parameter)


@contextmanager
def _gathered(weight: Any) -> Iterator[bool]:
    from deepspeed import zero

    with zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        yield True


def _give_dimension(parameter: Any) -> None:
    if parameter.data.dim() == 0:
        parameter.data = parameter.data.view(1)
