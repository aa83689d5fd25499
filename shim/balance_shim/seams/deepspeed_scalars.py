"""`deepspeed.runtime.zero.partition_parameters`: parameters without dimensions, such as CLIP's `logit_scale`.

DeepSpeed (0.17 to 0.19) sends a parameter as bytes, `param.data.view(torch.uint8)`, which torch refuses for a tensor
without dimensions. With one dimension it can be sent; `ds_shape`, taken before, restores the shape when it is gathered.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `deepspeed.runtime.zero.partition_parameters`.

    Raises:
        SeamMoved: this version converts or gathers parameters somewhere else.
    """
    for name, method, wrapper in (
        ("Init", "_convert_to_deepspeed_param", _around_convert),
        ("GatheredParameters", "__exit__", _around_exit),
    ):
        owner = getattr(module, name, None)
        if not callable(getattr(owner, method, None)):
            raise SeamMoved(f"{module.__name__}.{name}.{method}", version_text("deepspeed"))
        registry.replace(owner, method, wrapper)


def _around_convert(original: Callable[..., Any]) -> Callable[..., Any]:
    def _convert_to_deepspeed_param(self: Any, param: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, param, *args, **kwargs)
        modes.current().after_partition(param)
        return result

    return _convert_to_deepspeed_param


def _around_exit(original: Callable[..., Any]) -> Callable[..., Any]:
    def __exit__(self: Any, *error: Any) -> Any:
        modes.current().before_regather(self)
        return original(self, *error)

    return __exit__
