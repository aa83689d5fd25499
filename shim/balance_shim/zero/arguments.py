"""`TrainingArguments` under ZeRO-3: they get the config before they look at their devices."""

import os
from collections.abc import Mapping
from typing import Any

from .. import devices, log, state, zero_support
from ..errors import SettingError
from ..patching.guard import attempt
from ..upstream.trainer import PartitionedArgumentsLike, TrainingArgumentsLike
from . import config, session, shared_paths
from .launching import other_ways
from .weights import loading

# Keys of a DeepSpeed config that `TrainingArguments` have too; transformers refuses a difference.
SHARED = {
    "gradient_clipping": "max_grad_norm",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}


def prepare(arguments: TrainingArgumentsLike) -> None:
    """Give `arguments`, before their `__post_init__`, the DeepSpeed config and the values that belong to it.

    Raises:
        BalanceError: ZeRO-3 cannot be had.
    """
    other_ways.refuse_in_arguments(arguments, os.environ)
    session.begin(float(arguments.ddp_timeout))
    attempt("sharing the folders of the first rank", shared_paths.use_folders_of_first_rank, arguments)
    training_config, added = config.for_training(arguments.deepspeed)
    if added:
        log.once("info", zero_support.sentence("own_config", added=", ".join(added)))
    arguments.deepspeed = training_config
    carry_over(state.settings().zero_config or {}, arguments)
    seconds = state.settings().nccl_timeout
    if seconds is not None:
        arguments.ddp_timeout = seconds
    fields = getattr(type(arguments), "__dataclass_fields__", {})
    if "average_tokens_across_devices" in fields and not fields["average_tokens_across_devices"].default:
        arguments.average_tokens_across_devices = True  # as from 5.0 on: rows of unequal length weigh as in one process
    if devices.accelerator_type() is None:
        arguments.use_cpu = False  # with it accelerate leaves DeepSpeed out; there is nothing but the CPU anyway


def carry_over(overrides: Mapping[str, Any], arguments: TrainingArgumentsLike) -> None:
    """Put the values of `BALANCE_ZERO_CONFIG` into `arguments` that differ: it takes precedence.

    Raises:
        SettingError: a value is not of the kind that the arguments have there.
    """
    changed = []
    for key, name in SHARED.items():
        value: Any = overrides
        for part in key.split("."):
            value = value.get(part, "auto") if isinstance(value, Mapping) else "auto"
        before = getattr(arguments, name)
        if value == "auto" or value == before:
            continue
        if isinstance(value, bool) != (key.endswith("enabled")) or not isinstance(value, (bool, int, float)):
            raise SettingError(
                f"BALANCE_ZERO_CONFIG: {key}={value!r} is not a value of {name}, which is {before!r} in the script"
            )
        setattr(arguments, name, value)
        changed.append(f"{name}={value!r} instead of {before!r}")
    if changed:
        log.once("info", f"BALANCE_ZERO_CONFIG overrides the script: {', '.join(changed)}")


def take_over(arguments: PartitionedArgumentsLike) -> None:
    """Keep the config that transformers has made of it alive, and in the precision of models that are there already."""
    session.keep_alive(arguments.hf_deepspeed_config)
    half = arguments.hf_deepspeed_config.config.get("fp16", {})
    if half.get("enabled") is True and not loading.is_supported("fp16"):
        # ms-swift asks for it wherever weights are float32. DeepSpeed would refuse to start.
        half["enabled"] = False
        log.once("info", "fp16 is not supported on these CPUs; training uses the precision of the weights")
    loading.adopt_precision()
