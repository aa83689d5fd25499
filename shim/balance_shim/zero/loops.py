"""Training loops of the script's own under ZeRO-3: those of accelerate get an engine, bare ones are refused.

The Trainer hands accelerate a DeepSpeed plugin that `TrainingArguments` have made. A script that makes its own
`Accelerator` has none, while its model has been partitioned: its optimizer would train empty tensors.
"""

import os
from typing import TYPE_CHECKING, Any

from .. import log, zero_support
from . import config, session
from .launching import other_ways

if TYPE_CHECKING:
    from torch import nn

_ours: list[Any] = []  # the plugins that were made here


def with_plugin(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of an `Accelerator` with a DeepSpeed plugin, unless it has or will find another.

    Raises:
        BalanceError: ZeRO-3 cannot be had, or the script asks for FSDP or Megatron.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    if arguments.get("deepspeed_plugin") is not None or arguments.get("deepspeed_plugins") is not None:
        return arguments  # the Trainer's, or one of the script's own
    if AcceleratorState._shared_state.get("deepspeed_plugins") is not None:
        return arguments  # which the new Accelerator shares
    other_ways.refuse_in_accelerator(arguments, os.environ)
    session.begin()
    settings, _ = config.for_training(None)
    if settings.get("gradient_clipping") == "auto":
        settings["gradient_clipping"] = 0.0  # none; left to itself accelerate would clip to 1
    if arguments.get("mixed_precision") is None:
        settings.update(config.precision(session.loaded_dtype()))
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    plugin.set_deepspeed_weakref()
    _ours.append(plugin)
    log.once("info", "the script's Accelerator trains with DeepSpeed ZeRO-3")
    return {**arguments, "deepspeed_plugin": plugin}


def check_clipping(accelerator: Any, max_norm: Any) -> None:
    """Refuse to clip where DeepSpeed, which has made its step by then, has not been told to.

    Raises:
        BalanceError: the config has no `gradient_clipping`, or another.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or not any(plugin is own for own in _ours):
        return
    clipping = plugin.deepspeed_config.get("gradient_clipping")
    if clipping != float(max_norm):
        raise zero_support.refusal("clip_by_norm", norm=float(max_norm), configured=clipping or "no clipping")


def refuse_clipping_by_value(accelerator: Any) -> None:
    """Refuse to clip by value, which DeepSpeed cannot do.

    Raises:
        BalanceError: always, under a plugin of ours.
    """
    if any(getattr(accelerator.state, "deepspeed_plugin", None) is own for own in _ours):
        raise zero_support.refusal("clip_by_value")


def refuse_bare_loop(model: "nn.Module") -> None:
    """Refuse to run `model`, which has no engine, forward for a training that nobody has prepared.

    Raises:
        BalanceError: gradients would be wanted.
    """
    import torch

    trains = any(parameter.requires_grad for parameter in model.parameters())
    if model.training and torch.is_grad_enabled() and trains:
        raise zero_support.refusal("bare_loop", model=type(model).__name__)
