"""The adapters that LoRA will put into a model that has none yet, as PEFT itself makes them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...upstream.quantized import is_quantized_linear
from ..blocks import Block, within
from ..estimate import LORA_RANK
from .errors import CannotTrace


def with_adapters(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """Put adapters into `model`, which must be a copy on the meta device, and return it. Nothing else trains then.

    Raises:
        CannotTrace: PEFT is missing, or does not take this model.
    """
    try:
        import peft
    except ImportError:
        raise CannotTrace("PEFT is not installed (pip install peft)") from None
    layers = [block.name for block in blocks if block.role == "layer"]
    targets = [
        name
        for name, module in model.named_modules()
        if _takes_adapters(module) and any(within(name, layer) for layer in layers)
    ]
    if not targets:
        raise CannotTrace("its layers have no linear layers for adapters")
    with torch.device("meta"):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, target_modules=targets))
    return cast(nn.Module, wrapped.base_model.model)


def _takes_adapters(module: nn.Module) -> bool:
    # Models have linear layers of classes of their own, which PEFT takes; torch's own attention has one it must not.
    linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return linear or type(module).__name__ == "Conv1D" or is_quantized_linear(module)
