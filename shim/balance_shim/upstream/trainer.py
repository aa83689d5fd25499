"""The attributes of a `transformers.Trainer` and its like that the shim reads, as protocols.

Trainers of TRL and ms-swift extend the Trainer. A Trainer has each attribute from its constructor on, as
`tests/contracts` checks with the installed transformers. Attributes that only some versions have are read with
`getattr` and a default, and are not listed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn


class TrainingArgumentsLike(Protocol):
    """`transformers.TrainingArguments`."""

    output_dir: str
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    eval_accumulation_steps: int | None
    prediction_loss_only: bool
    auto_find_batch_size: bool
    dataloader_drop_last: bool
    remove_unused_columns: bool | None
    gradient_checkpointing: bool
    optim: Any  # an `OptimizerNames`, or its value
    bf16: bool
    fp16: bool
    use_cpu: bool
    average_tokens_across_devices: bool
    ddp_timeout: int
    deepspeed: Any  # a dict, a path, or None
    deepspeed_plugin: Any  # accelerate's, or None

    @property
    def device(self) -> "torch.device":
        """The device that the Trainer brings inputs to."""

    @property
    def world_size(self) -> int:
        """The number of processes that train together."""

    @property
    def n_gpu(self) -> int:
        """The number of devices over which this process spreads each batch by itself (`DataParallel`)."""

    @property
    def train_batch_size(self) -> int:
        """Sequences in a micro-batch of this process, on all of its devices."""


class PartitionedArgumentsLike(TrainingArgumentsLike, Protocol):
    """`transformers.TrainingArguments` with a DeepSpeed config, as their `__post_init__` leaves them."""

    hf_deepspeed_config: Any  # a `HfTrainerDeepSpeedConfig`


class TrainerStateLike(Protocol):
    """`transformers.TrainerState`."""

    global_step: int


class CallbackHandlerLike(Protocol):
    """`transformers.trainer_callback.CallbackHandler`."""

    callbacks: Sequence[Any]
    model: "nn.Module"
    optimizer: Any


class TrainerLike(Protocol):
    """`transformers.Trainer`."""

    args: TrainingArgumentsLike
    model: "nn.Module"
    model_wrapped: Any  # the outermost: an engine, DDP, or the model itself
    model_init: Callable[..., Any] | None
    model_accepts_loss_kwargs: bool
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    label_names: Sequence[str]
    data_collator: Callable[..., Any]
    train_dataset: Any
    optimizer: Any  # None until it is made
    lr_scheduler: Any  # likewise
    accelerator: Any  # an `accelerate.Accelerator`
    deepspeed: Any  # the engine, or None
    is_model_parallel: bool
    state: TrainerStateLike
    callback_handler: CallbackHandlerLike
    _train_batch_size: int
    _signature_columns: list[str] | None
    # Methods, some of which a context of ours replaces on one trainer.
    prediction_step: Callable[..., Any]
    compute_loss: Callable[..., Any]
    create_optimizer: Callable[..., Any]
    create_scheduler: Callable[..., Any]

    def _set_signature_columns_if_needed(self) -> None:
        """Fill `_signature_columns` with the names of the inputs of the model's forward."""

    def add_callback(self, callback: Any) -> Any:
        """Add a `TrainerCallback`."""

    def remove_callback(self, callback: Any) -> Any:
        """Remove a `TrainerCallback`."""
