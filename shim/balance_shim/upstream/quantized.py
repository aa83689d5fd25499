"""Linear layers whose weights a quantizer has packed."""

import torch
from torch import nn


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer whose weight is packed, by whatever library."""
    weight = getattr(module, "weight", None)
    if not all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features")):
        return False
    if type(module).__module__.startswith(("torch.nn.modules", "peft.")) or hasattr(module, "base_layer"):
        return False
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return type(weight).__name__ in ("Params4bit", "Int8Params")
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    # A layer of a model's own that has its weights under other names has nothing but real numbers.
    packed = any(not tensor.is_floating_point() for _, tensor in own)
    return packed or all(name == "bias" for name, _ in own)
