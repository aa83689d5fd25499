"""The attributes of a `transformers.Trainer` and its like that the shim reads, as protocols.

Trainers of TRL and ms-swift extend the Trainer. A Trainer has each attribute from its constructor on, as
`tests/contracts` checks with the installed transformers. Attributes that only some versions have are read with
`getattr` and a default, and are not listed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class TrainingArgumentsLike(Protocol):
    """`transformers.TrainingArguments`."""

    output_dir: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    optim: Any  # an `OptimizerNames`, or its value
    bf16: bool
    fp16: bool

    @property
    def device(self) -> "torch.device":
        """The device that the Trainer brings inputs to."""


class TrainerStateLike(Protocol):
    """`transformers.TrainerState`."""

    global_step: int


class CallbackHandlerLike(Protocol):
    """`transformers.trainer_callback.CallbackHandler`."""

    callbacks: Sequence[Any]


class TrainerLike(Protocol):
    """`transformers.Trainer`."""

    args: TrainingArgumentsLike
    model: Any
    optimizer: Any  # None until it is made
    state: TrainerStateLike
    callback_handler: CallbackHandlerLike

    def add_callback(self, callback: Any) -> Any:
        """Add a `TrainerCallback`."""

    def remove_callback(self, callback: Any) -> Any:
        """Remove a `TrainerCallback`."""
