"""Functions that libraries and scripts have put into single modules, made to speak of a copy instead of the original.

`copy.deepcopy` takes functions as they are, closures included. ms-swift gives multimodal models a `forward` whose
closure holds the language model (`use_submodel_func`, ms-swift 4.6): in a copy of the model it would run the original,
on real devices, and take real memory there.
"""

import functools
import types
from typing import Any

from torch import nn

_CALLABLES = (types.FunctionType, types.MethodType, functools.partial)


def rebind(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions in the attributes and hooks of `model`'s modules refer to the copies instead of the originals.

    Args:
        model: the copy.
        memo: id of an original -> its copy, as `copy.deepcopy` has filled it.
    """
    for module in list(model.modules()):
        for name, value in list(vars(module).items()):
            if isinstance(value, _CALLABLES):
                module.__dict__[name] = _rebound(value, memo, {})
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for handle, hook in list(hooks.items()):
                if isinstance(hook, _CALLABLES):
                    hooks[handle] = _rebound(hook, memo, {})


def _rebound(value: Any, memo: dict[int, Any], copies: dict[int, Any]) -> Any:
    """Return `value` with originals replaced by copies: in closures, bound objects and arguments of partials."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, types.MethodType):
        function, owner = _rebound(value.__func__, memo, copies), memo.get(id(value.__self__), value.__self__)
        same = function is value.__func__ and owner is value.__self__
        return value if same else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        function = _rebound(value.func, memo, copies)
        arguments = tuple(_rebound(argument, memo, copies) for argument in value.args)
        keywords = {name: _rebound(argument, memo, copies) for name, argument in value.keywords.items()}
        return functools.partial(function, *arguments, **keywords)
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, memo, copies)
    return memo.get(id(value), value) if isinstance(value, nn.Module) else value


def _rebound_function(function: types.FunctionType, memo: dict[int, Any], copies: dict[int, Any]) -> types.FunctionType:
    if not function.__closure__:
        return function
    copies[id(function)] = function  # a function may hold itself
    cells = []
    for cell in function.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            cells.append(cell)
            continue
        rebound = _rebound(content, memo, copies)
        cells.append(cell if rebound is content else types.CellType(rebound))
    if all(new is old for new, old in zip(cells, function.__closure__, strict=True)):
        return function
    result = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    result.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(result, function)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:  # update_wrapper names `function` itself
        result.__dict__["__wrapped__"] = wrapped
    return result
