"""`torch.autograd.function`: operations written in Python, fused losses among them, get whole weights under ZeRO-3.

Tensor subclasses, by which partitioned weights notice all other operations, do not see these.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..patching import registry

DEEPSPEEDS_LINEAR = "deepspeed.runtime.zero.linear"  # whose class is called in place of torch.nn.functional.linear


def apply(module: Any) -> None:
    """Patch `torch.autograd.Function`. To be called once ZeRO-3 has begun: other programs do not need it."""
    registry.replace(module.Function, "apply", _around_apply)


def _around_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    from .weights import gathering, partitioned_parameter

    kind = partitioned_parameter.PartitionedParameter

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        is_linear = cls.__module__ == DEEPSPEEDS_LINEAR
        for argument in args:
            if type(argument) is not kind:
                continue
            if partitioned_parameter.is_partitioned(argument):
                name = "linear" if is_linear else cls.__name__
                return partitioned_parameter.computed(partial(original, cls), name, args, kwargs)
            if not is_linear and argument.requires_grad and torch.is_grad_enabled():
                gathering.gather_for_gradient(argument)
        return original(cls, *args, **kwargs)

    return apply
