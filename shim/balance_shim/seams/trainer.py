"""Seam 2b, `transformers.trainer`: here the workload is known, and the loss must find its way between devices."""

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import modes, training_run
from ..monitoring.out_of_memory import is_out_of_memory
from ..patching import registry
from ..patching.guard import SeamMoved, attempt
from ..upstream.trainer import TrainerLike
from ..versions import version_of, version_text

if TYPE_CHECKING:
    from torch import nn

# The versions that count the label tokens of a step, and those that do it in a method of its own.
COUNTS_ITEMS_SINCE = (4, 46)
COUNTS_ITEMS_APART_SINCE = (4, 57)
# From the one to below the other, each rank looks for the best checkpoint's folder, and none waits for its writer.
LOOKS_TOO_EARLY = ((4, 50), (4, 57))


def apply(module: ModuleType) -> None:
    """Patch `transformers.trainer`.

    Raises:
        SeamMoved: this version keeps a seam somewhere else.
    """
    version = version_of("transformers")
    patches: list[tuple[str, Callable[..., Any]]] = [("train", _around_train), ("training_step", _around_step)]
    patches.append(("__init__", _around_init))
    patches.append(("create_optimizer", _around_create_optimizer))
    patches.append(("create_accelerator_and_postprocess", _around_create_accelerator))
    patches.append(("evaluation_loop", _around_evaluation_loop))
    if version >= COUNTS_ITEMS_SINCE:
        patches.append(("compute_loss", _around_compute_loss))
        patches.append(("get_batch_samples", _around_batch_samples))
    if version >= COUNTS_ITEMS_APART_SINCE:
        patches.append(("_get_num_items_in_batch", _around_item_count))
    patches.append(("save_model", _around_save_model))
    for name, _ in patches:
        if not callable(getattr(getattr(module, "Trainer", None), name, None)):
            raise SeamMoved(f"transformers.Trainer.{name}", version_text("transformers"))
    for name, wrapper in (*patches, *_SWAPS):
        if callable(getattr(module.Trainer, name, None)):
            registry.replace(module.Trainer, name, wrapper)
    registry.replace(module, "deepspeed_load_checkpoint", _around_load_checkpoint)


def _around_train(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        mode = modes.current()
        mode.before_training(self)
        try:
            result = original(self, *args, **kwargs)
        except BaseException as failure:
            with suppress(Exception):  # nothing of ours, also under BALANCE_STRICT, takes the place of this failure
                if is_out_of_memory(failure):
                    action, instead = "explaining the out-of-memory", "here is the error"
                    attempt(action, mode.explain_out_of_memory, self, failure, instead=instead)
            training_run.end_quietly(self)
            raise
        training_run.end(self)
        return result

    return train


def _around_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: TrainerLike, *args: Any, **kwargs: Any) -> None:
        modes.current().before_trainer(original, (self, *args), kwargs)
        original(self, *args, **kwargs)

    return __init__


def _around_inner_training_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def _inner_training_loop(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        if modes.current().before_loop(self) and args and not self.args.auto_find_batch_size:
            args = (self._train_batch_size, *args[1:])  # BALANCE_MICRO_BATCH=auto may have changed it
        return original(self, *args, **kwargs)

    return _inner_training_loop


def _around_call_model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_model_init(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        return modes.current().make_model(original, self, args, kwargs)

    return call_model_init


# Where a trainer's model becomes another one. Private, so that a version without them loses no more than that.
_SWAPS = (("_inner_training_loop", _around_inner_training_loop), ("call_model_init", _around_call_model_init))


def _around_create_accelerator(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_accelerator_and_postprocess(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        return modes.current().make_accelerator(original, self, args, kwargs)

    return create_accelerator_and_postprocess


def _around_evaluation_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluation_loop(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        return modes.current().evaluate(original, self, args, kwargs)

    return evaluation_loop


def _around_compute_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        return modes.current().compute_loss(original, self, args, kwargs)

    return compute_loss


def _around_create_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_optimizer(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        modes.current().after_optimizer(optimizer)
        return optimizer

    return create_optimizer


def _around_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def deepspeed_load_checkpoint(deepspeed_engine: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        modes.current().before_resuming(deepspeed_engine, checkpoint_path)
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)

    return deepspeed_load_checkpoint


def _around_save_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_model(self: TrainerLike, output_dir: Any = None, _internal_call: bool = False) -> Any:
        mode = modes.current()
        mode.before_saving(self)
        result = original(self, output_dir, _internal_call)
        if _internal_call and LOOKS_TOO_EARLY[0] <= version_of("transformers") < LOOKS_TOO_EARLY[1]:
            mode.after_checkpoint()
        return result

    return save_model


def _around_item_count(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_num_items_in_batch(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        return _placeless(self, original(self, *args, **kwargs))

    return _get_num_items_in_batch


def _around_batch_samples(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_batch_samples(self: TrainerLike, *args: Any, **kwargs: Any) -> Any:
        samples, count = original(self, *args, **kwargs)
        modes.current().fetched(self, samples)
        return samples, _placeless(self, count)

    return get_batch_samples


def _around_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def training_step(self: TrainerLike, model: "nn.Module", inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return modes.current().step(original, self, model, inputs, args, kwargs)

    return training_step


def _placeless(trainer: TrainerLike, count: Any) -> Any:
    """Return the number of label tokens on the host when the model spans several devices.

    The Trainer moves it to the first device, while the loss that is divided by it comes from the head's device; TRL
    1.16 divides the one by the other as they are, which stops the program. A single value on the host goes with
    any device, and stays a tensor, which trainers of users' own move with `.to`.
    """
    if getattr(trainer, "is_model_parallel", False) and hasattr(count, "cpu") and count.dim() == 0:
        return count.cpu()
    return count
