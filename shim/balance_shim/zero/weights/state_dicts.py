"""`state_dict()` and `load_state_dict()` by the script itself: whole weights, where DeepSpeed has left empty tensors.

Libraries that know of partitioned weights get what they always get.
"""

import sys
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from .. import meeting
from . import partitioned_parameter

_INSIDE = ("torch.nn.modules.module", "balance_shim", "contextlib")  # between the script's call and our hooks
_armed: "WeakSet[nn.Module]" = WeakSet()
_gathered: "WeakKeyDictionary[nn.Module, ExitStack]" = WeakKeyDictionary()  # while a state loads


def arm(model: nn.Module) -> None:
    """Have the states of `model` and of its modules be read and loaded with whole weights."""
    for module in model.modules():
        if module in _armed or not any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
            continue
        _armed.add(module)
        module.register_state_dict_post_hook(_read)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)


def _read(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    parts = {f"{prefix}{name}": parameter for name, parameter in _partitioned(module).items()}
    # With keep_vars=True the script gets the parameters themselves.
    parts = {key: parameter for key, parameter in parts.items() if key in state and state[key] is not parameter}
    if not parts or _is_librarys():
        return
    from deepspeed import zero

    meeting.meet("state_dict()")
    with zero.GatheredParameters(list(parts.values())):
        for key, parameter in parts.items():
            state[key] = parameter.data.detach().cpu().clone()  # on the host: the whole model may not fit one device


def _before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    parts = [parameter for name, parameter in _partitioned(module).items() if f"{prefix}{name}" in state]
    if not parts or _is_librarys():
        return
    from deepspeed import zero

    meeting.meet("load_state_dict()")
    stack = _gathered[module] = ExitStack()
    stack.enter_context(zero.GatheredParameters(parts, modifier_rank=0))


def _after_load(module: nn.Module, _: Any) -> None:
    stack = _gathered.pop(module, None)
    if stack is not None:
        with torch.no_grad():
            stack.close()


def _partitioned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `module` itself that are partitioned now, by name."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    return {name: parameter for name, parameter in own.items() if partitioned_parameter.is_partitioned(parameter)}


def _is_librarys() -> bool:
    """Return whether a library calls that knows of partitioned weights."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(_INSIDE):
            return name.partition(".")[0] in partitioned_parameter.KNOWING
        frame = frame.f_back
    return False
