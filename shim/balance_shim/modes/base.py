"""A mode: one method for each moment of a program that a seam reports. This one leaves everything to the libraries.

Seams know what a version of a library calls a moment, and no mode; modes know what to do, and no version. A method
whose first argument is `original` stands around that function of the library and calls it once; the others come before
or after one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import state
from ..map_file import DeviceMap
from ..placement.model_load import ModelLoad
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike

if TYPE_CHECKING:
    from torch import nn

Original = Callable[..., Any]


class Mode:
    """A mode that does nothing: `off`."""

    # The program begins to look like a training.

    def training_is_near(self) -> None:
        """`TrainingArguments` can be imported now."""

    def before_launcher(self, program: str) -> None:
        """The launcher of `program` ("swift", "llamafactory") is about to read how many processes to start."""

    def before_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """`TrainingArguments` are about to look at themselves and at the devices."""

    def after_arguments(self, arguments: TrainingArgumentsLike) -> None:
        """`TrainingArguments` are complete."""

    def allows_bf16_on_cpu(self) -> bool:
        """Return whether bf16 is accepted without an accelerator, which transformers refuses."""
        return state.settings().precision is not None

    # Models load and are saved.

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `cls.from_pretrained`."""
        return original(cls, *args, **kwargs)

    def makes_map(self, device_map: Any) -> bool:
        """Return whether a map is to be made in place of `device_map`, as the script gives it."""
        return False

    def device_map_for(self, load: ModelLoad) -> DeviceMap | None:
        """Return the device map of a model that is about to load; None leaves it to the library."""
        return None

    def save(self, original: Original, model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `model.save_pretrained`, of a model of transformers."""
        return original(model, *args, **kwargs)

    def save_adapters(
        self, original: Original, model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand around `model.save_pretrained`, of a model of PEFT."""
        return original(model, *args, **kwargs)

    def merging_adapters(self, model: "nn.Module") -> AbstractContextManager[Any]:
        """Return the context in which PEFT merges adapters into the weights of `model`."""
        return nullcontext()

    def reading_weight(self, weight: Any) -> AbstractContextManager[Any]:
        """Return the context in which a library reads values of `weight` outside of the module's forward pass."""
        return nullcontext()

    def reading_tokens(self, weight: Any) -> AbstractContextManager[bool]:
        """Return the context in which PEFT reads tokens of an embedding's `weight`.

        Its value is whether this rank reads them itself, instead of PEFT, which sends them from another rank.
        """
        return nullcontext(False)

    def generating(self, model: Any, options: dict[str, Any]) -> AbstractContextManager[Any]:
        """Return the context in which `model` generates, with these keyword arguments of `generate`."""
        return nullcontext()

    # A Trainer is made.

    def before_trainer(self, init: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`init`, `Trainer.__init__`, is about to be called with these arguments, the trainer first."""

    def make_model(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand around `call_model_init`, which makes the model of one training and drops that of the last."""
        return original(trainer, *args, **kwargs)

    def make_accelerator(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand around the making of the trainer's `Accelerator`."""
        return original(trainer, *args, **kwargs)

    def after_optimizer(self, optimizer: Any) -> None:
        """The trainer has made its optimizer."""

    # It trains.

    def before_training(self, trainer: TrainerLike) -> None:
        """`Trainer.train` has been called."""

    def before_loop(self, trainer: TrainerLike) -> bool:
        """The training loop begins. Return whether training was prepared again, for another model."""
        return False

    def fetched(self, trainer: TrainerLike, samples: Any) -> None:
        """`trainer` has fetched the micro-batches of its next optimizer step."""

    def step(
        self,
        original: Original,
        trainer: TrainerLike,
        model: "nn.Module",
        inputs: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stand around `training_step`; returns its loss."""
        return original(trainer, model, inputs, *args, **kwargs)

    def compute_loss(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand around `Trainer.compute_loss`, where the trainer counts label tokens."""
        return original(trainer, *args, **kwargs)

    def evaluate(self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `evaluation_loop`, of evaluations and predictions."""
        return original(trainer, *args, **kwargs)

    def explain_out_of_memory(self, trainer: TrainerLike, failure: BaseException) -> None:
        """Training ended by `failure`, an out-of-memory error."""

    # Checkpoints.

    def before_resuming(self, engine: Any, checkpoint: Any) -> None:
        """DeepSpeed's `engine` is about to load a checkpoint."""

    def before_saving(self, trainer: TrainerLike) -> None:
        """`Trainer.save_model` has been called."""

    def after_checkpoint(self) -> None:
        """A checkpoint was written, in a version of transformers whose ranks do not wait for its writer."""

    # Loops of accelerate's.

    def process_backend(self) -> tuple[str, Any] | None:
        """Return accelerate's backend and `DistributedType` of this process; None: accelerate chooses."""
        return None

    def accelerator_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of an `Accelerator` that the program makes."""
        return options

    def after_device_choice(self, partial_state: Any) -> None:
        """accelerate's `PartialState` has chosen the device of this process."""

    def prepare_model(self, original: Original, accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `Accelerator.prepare_model`, whose first argument is the model."""
        return original(accelerator, *args, **kwargs)

    def preparing(self, objects: tuple[Any, ...]) -> AbstractContextManager[Any]:
        """Return the context in which accelerate prepares `objects`."""
        return nullcontext()

    def before_clipping_norm(self, accelerator: Any, max_norm: Any) -> None:
        """The program clips gradients to a norm."""

    def before_clipping_value(self, accelerator: Any) -> None:
        """The program clips gradients by value."""

    # DeepSpeed.

    def compiles_shared_memory(self) -> bool:
        """Return whether DeepSpeed may compile its operation for processes on one CPU."""
        return True

    def engine_config(self, trainer: TrainerLike) -> Any:
        """Return the DeepSpeed config of `trainer` that the mode has chosen; None where the program chooses."""
        return None

    def before_engine_config(self, config: Any, model: "nn.Module") -> None:
        """The last "auto" entries of `config`, an `HfTrainerDeepSpeedConfig`, become numbers of `model`."""

    def after_engine_backward(self, engine: Any) -> None:
        """DeepSpeed's `engine` has run a backward pass."""

    def engine_without_sync(self, original: Original, engine: Any) -> Any:
        """Return the context of a backward pass whose gradients DeepSpeed's `engine` keeps to itself."""
        return original(engine)

    def before_engine_step(self, engine: Any) -> None:
        """DeepSpeed's `engine` is about to make a step, which updates the weights when gradients are complete."""

    def after_engine_step(self, engine: Any) -> None:
        """DeepSpeed's `engine` has made a step."""

    def after_partition(self, parameter: Any) -> None:
        """DeepSpeed has made `parameter` one that it partitions."""

    def before_regather(self, context: Any) -> None:
        """`context`, a `GatheredParameters`, is about to send its parameters and partition them again."""
