"""A model as it would be in another precision: the same modules with other dtypes, and no values."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def in_dtype(model: "nn.Module", dtype: Any) -> "nn.Module":
    """Return a copy of `model` on the meta device whose floating-point parameters are `dtype` (a torch dtype).

    Buffers keep theirs, as `from_pretrained(dtype=...)` leaves most of them alone.

    Raises:
        CannotTrace: something in the model cannot be copied.
    """
    import torch

    from .tracing.model_copy import copy_of

    parameters = {id(parameter) for parameter in model.parameters()}

    def twin(name: str, tensor: "Tensor") -> "Tensor":
        changes = id(tensor) in parameters and tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=dtype if changes else tensor.dtype, device="meta")

    return copy_of(model, twin)


def trains_in(model: "nn.Module", dtype: Any) -> bool:
    """Whether `model` has trained parameters of `dtype` and is not quantized."""
    if getattr(getattr(model, "config", None), "quantization_config", None):
        return False
    return any(parameter.requires_grad and parameter.dtype == dtype for parameter in model.parameters())
