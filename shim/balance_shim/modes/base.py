"""The moments at which a mode may act. The defaults leave the library as it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .. import state


class Mode:
    """One method per moment. A mode overrides those at which it acts.

    Methods that a seam calls ahead of or after an original return what the original gets or gives.
    """

    def training_imported(self) -> None:
        """`transformers.training_args` has been imported: the program is about training."""

    def before_arguments(self, arguments: Any) -> None:
        """`arguments`, a `TrainingArguments`, have their fields, which are not validated yet."""

    def after_arguments(self, arguments: Any) -> None:
        """`arguments`, a `TrainingArguments`, are validated."""

    def allows_bf16_on_cpu(self) -> bool:
        """Whether bf16 is accepted without an accelerator, which transformers refuses."""
        return state.settings().precision is not None

    def process_backend(self) -> tuple[str, Any] | None:
        """Return accelerate's backend and `DistributedType` of this process; None: accelerate chooses."""
        return None

    def compiles_shared_memory(self) -> bool:
        """Whether DeepSpeed may compile its operation for processes on one CPU."""
        return True

    def accelerator_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of an `Accelerator` instead of the script's `options`."""
        return options

    def before_clipping_norm(self, accelerator: Any, max_norm: Any) -> None:
        """The script clips gradients to `max_norm` in a loop of its own."""

    def before_clipping_value(self, accelerator: Any) -> None:
        """The script clips each value of the gradients in a loop of its own."""

    def before_engine_config(self, config: Any, model: Any) -> None:
        """The last "auto" entries of `config`, an `HfTrainerDeepSpeedConfig`, become numbers of `model`."""

    def after_engine_backward(self) -> None:
        """The backward pass of DeepSpeed's engine has ended."""

    def before_engine_step(self) -> None:
        """DeepSpeed's engine is about to update the weights."""

    def after_partition(self, parameter: Any) -> None:
        """DeepSpeed has made `parameter` one that it partitions."""

    def before_regather(self, context: Any) -> None:
        """`context`, a `GatheredParameters`, is about to send its parameters and partition them again."""

    def merging_adapters(self, model: Any) -> AbstractContextManager[Any]:
        """Return the context in which PEFT merges adapters into the weights of `model`."""
        return nullcontext()

    def reading_tokens(self, weight: Any) -> AbstractContextManager[bool]:
        """Return the context in which PEFT reads tokens of an embedding's `weight`.

        Its value is whether this rank reads them itself, instead of PEFT, which sends them from another rank.
        """
        return nullcontext(False)

    def save_adapters(
        self, original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Save the adapters of `model` by calling `original`, PEFT's `save_pretrained`, once."""
        return original(model, *args, **kwargs)
