"""CUDA's rules of mixed precision in a trace, whose tensors are on the CPU as far as torch knows.

`torch.autocast("cpu")` has the rules of CPUs. Those that CUDA has beyond them, computing in float32 or in the widest
type, are put on top, as functions are called from Python: below, autograd would not see the conversions. Functions that
Python code of torch calls inside of others (`torch.nn.functional.normalize`) are not reached.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...device_rules import autocast
from .machine import TracedTensor


def _base_names(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in names)


_SINGLE, _BY_ARGUMENT = _base_names(autocast.SINGLE), _base_names(autocast.SINGLE_BY_ARGUMENT)
_WIDEST = _base_names(autocast.WIDEST)


class CudaRules(TorchFunctionMode):
    """Converts arguments where CUDA's autocast would, while autocast is on: also in recomputation."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = autocast.PYTHON_NAMES.get(name, name)
        if name in _SINGLE and torch.is_autocast_enabled("cpu"):
            return func(*_converted(args, torch.float32), **_converted(kwargs, torch.float32))
        if name in _BY_ARGUMENT and torch.is_autocast_enabled("cpu") and args and _is_castable(args[0]):
            if kwargs.get("dtype") is None and not any(isinstance(argument, torch.dtype) for argument in args):
                kwargs = {**kwargs, "dtype": torch.float32}
        elif name in _WIDEST and torch.is_autocast_enabled("cpu"):
            types_met = set(_types((args, kwargs)))
            if len(types_met) > 1:
                widest = torch.float32 if torch.float32 in types_met else types_met.pop()
                return func(*_converted(args, widest), **_converted(kwargs, widest))
        return func(*args, **kwargs)


def _is_castable(value: Any) -> bool:
    return isinstance(value, TracedTensor) and value.is_floating_point() and value.dtype is not torch.float64


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if _is_castable(value):
        return value.to(dtype)
    if type(value) in (list, tuple):
        return type(value)(_converted(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _converted(item, dtype) for name, item in value.items()}
    return value


def _types(value: Any) -> Iterator[torch.dtype]:
    if _is_castable(value):
        yield value.dtype
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _types(item)
    elif isinstance(value, dict):
        yield from _types(list(value.values()))
