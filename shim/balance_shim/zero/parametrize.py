"""`torch.nn.utils.parametrize`: it computes with the weight that it is given, which is gathered for it."""

from collections.abc import Callable
from typing import Any

from ..patching import registry
from . import meeting


def apply(module: Any) -> None:
    """Patch `torch.nn.utils.parametrize`. To be called once ZeRO-3 has begun."""
    registry.replace(module, "register_parametrization", _around_register)


def _around_register(original: Callable[..., Any]) -> Callable[..., Any]:
    def register_parametrization(module: Any, tensor_name: str, *args: Any, **kwargs: Any) -> Any:
        from .weights import partitioned_parameter

        weight = getattr(module, tensor_name, None)
        if not partitioned_parameter.is_partitioned(weight):
            return original(module, tensor_name, *args, **kwargs)
        from deepspeed import zero

        meeting.meet("register_parametrization()")
        with zero.GatheredParameters([weight], modifier_rank=0):
            return original(module, tensor_name, *args, **kwargs)

    return register_parametrization
