"""The bytes of each parameter as it will be loaded: by the library's quantizer and dtype rules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..versions import version_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ParameterBytes = Callable[[str, "Tensor"], float]


def for_request(model: "nn.Module", quantizer: Any, dtype: Any) -> ParameterBytes | None:
    """Return a function (name, parameter) -> bytes for `model` under `quantizer`; None when nothing is quantized.

    transformers 5 asks the quantizer for each parameter; 4.x asks for one dtype, and for names that keep another.
    """
    if quantizer is None:
        return None
    if version_of("transformers") >= (5,):
        return lambda name, tensor: tensor.numel() * quantizer.param_element_size(model, name, tensor)
    special = quantizer.get_special_dtypes_update(model, dtype)
    return for_dtypes(model, quantizer.adjust_target_dtype(dtype), special)


def for_dtypes(model: "nn.Module", dtype: Any, special: dict[str, Any] | None) -> ParameterBytes:
    """Return sizes as accelerate computes them when everything is `dtype` but for the names in `special`."""
    from accelerate.utils.modeling import compute_module_sizes

    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special or {})
    return lambda name, tensor: sizes.get(name, tensor.numel() * tensor.element_size())
