"""`TrainingArguments` under ZeRO-3: they get the config before they look at their devices."""

from typing import Any

from .. import devices, log, state
from . import config, loading, session


def prepare(arguments: Any) -> None:
    """Give `arguments`, before their `__post_init__`, the DeepSpeed config and what goes with it.

    Raises:
        BalanceError: ZeRO-3 cannot be had.
    """
    session.begin()
    found, added = config.for_training(arguments.deepspeed)
    if added:
        log.once("info", f"your DeepSpeed config wins; added to it: {', '.join(added)}")
    arguments.deepspeed = found
    seconds = state.settings().nccl_timeout
    if seconds is not None:
        arguments.ddp_timeout = seconds
    fields = type(arguments).__dataclass_fields__
    if "average_tokens_across_devices" in fields and not fields["average_tokens_across_devices"].default:
        arguments.average_tokens_across_devices = True  # as from 5.0 on: rows of unequal length weigh as in one process
    if devices.accelerator_type() is None:
        arguments.use_cpu = False  # with it accelerate leaves DeepSpeed out; there is nothing but the CPU anyway


def take_over(arguments: Any) -> None:
    """Keep the config that transformers has made of it alive, and in the precision of models that are there already."""
    session.keep_alive(arguments.hf_deepspeed_config)
    half = arguments.hf_deepspeed_config.config.get("fp16", {})
    if half.get("enabled") is True and not loading.is_supported("fp16"):
        # ms-swift asks for it wherever weights are float32. DeepSpeed would refuse to start.
        half["enabled"] = False
        log.once(
            "info", "fp16 is nothing that these processors compute with: training is in the precision of the weights"
        )
    loading.adopt_precision()
