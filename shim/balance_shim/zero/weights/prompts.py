"""Prompts that PEFT computes when it saves them, which the first rank does alone.

p-tuning and prefix tuning with a projection save what their encoder makes of its tokens. The encoder's weights are
partitioned, so that it would wait for the other ranks; the whole weights are at hand, as they are about to be saved.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODERS = "prompt_encoder"  # of PEFT's models: a ModuleDict, adapter name -> encoder


@contextmanager
def computed_from(weights: "Mapping[str, Tensor]", model: "nn.Module") -> Iterator[None]:
    """Have the encoders of prompts in `model` run on `weights`, {name in `model`: whole tensor}, without any hooks."""
    held: dict[str, nn.Module] = getattr(getattr(model, ENCODERS, None), "_modules", {})
    before = dict(held)
    try:
        for name, encoder in before.items():
            prefix = f"{ENCODERS}.{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
            if own.keys() >= {key for key, _ in encoder.named_parameters()}:
                held[name] = _with_weights(encoder, own)
        yield
    finally:
        for name, encoder in before.items():
            held[name] = encoder


def _with_weights(module: "nn.Module", weights: "Mapping[str, Tensor]", prefix: str = "") -> "nn.Module":
    """Return a shallow copy of `module` with the tensors in `weights` as its parameters, and without hooks."""
    twin = copy.copy(module)
    fields = vars(twin)
    for name in [name for name in fields if name.endswith("_hooks")]:
        fields[name] = type(fields[name])()
    fields["_parameters"] = {
        name: parameter if parameter is None else weights[f"{prefix}{name}"]
        for name, parameter in module._parameters.items()
    }
    fields["_modules"] = {
        name: child if child is None else _with_weights(child, weights, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return twin
