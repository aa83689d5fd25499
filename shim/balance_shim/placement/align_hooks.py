"""accelerate's hooks on a dispatched model, changed to suit another device map.

A fresh `dispatch_model` puts an `AlignDevicesHook` on the model, on every module that the map names, and on every
module with weights below those. Here the hooks that are there are kept and only told their new device: what others
have since put around `forward` stays, and no weight is touched. Hooks are added or removed where the two maps name
different modules, or where one of them has a single device and so no hooks.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .movable_pieces import Places

if TYPE_CHECKING:
    from torch import nn


def align(model: "nn.Module", places: Places, undo: ExitStack) -> None:
    """Give the model the hooks that dispatching with the map of `places` makes; `undo` gets the way back."""
    hooked = {module for module in model.modules() if hooks_of(module)}
    device_of_module = _wanted(model, places, hooked) if places.several or _needs_hooks(model, hooked) else {}
    for module in model.modules():
        device, hooks = device_of_module.get(module), hooks_of(module)
        if device is None:
            if hooks:
                _remove(module, undo)
        elif hooks:
            for hook in hooks:
                if hook.execution_device != device:
                    undo.callback(setattr, hook, "execution_device", hook.execution_device)
                    hook.execution_device = device
        else:
            _add(module, device, model, undo)


def renew_tied_addresses(model: "nn.Module") -> None:
    """Write the addresses that tied weights have now into the table that the hooks share.

    accelerate looks weights up there by address when a hook is attached again; by an old address it might find
    another weight. The table also keeps the tensors alive that it knows.
    """
    from ..memory.ties import tied_groups

    tables = {id(hook.tied_params_map): hook.tied_params_map for module in model.modules() for hook in hooks_of(module)}
    tables.pop(id(None), None)
    if tables:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        first_names = [min(group & parameters.keys()) for group in tied_groups(model) if group & parameters.keys()]
        addresses: dict[int, dict[Any, Any]] = {parameters[name].data_ptr(): {} for name in first_names}
        for table in tables.values():
            table.clear()
            table.update(addresses)


def _wanted(model: "nn.Module", places: Places, hooked: "set[nn.Module]") -> "dict[nn.Module, int | str]":
    """Return the device of each module that needs a hook.

    In a model that has been dispatched, modules without a hook that are not in the map are PEFT's: they run where the
    modules around them do.
    """
    dispatched = model in hooked
    devices: dict[nn.Module, int | str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        device = places.of_module(name)
        if device is not None and (
            module in hooked or name in places.device_map or (not dispatched and _has_weights(module))
        ):
            devices[module] = device
    devices[model] = places.first
    return devices


def _needs_hooks(model: "nn.Module", hooked: "set[nn.Module]") -> bool:
    """Whether hooks stay even on one device: where accelerate was made to put them there, as for quantized models."""
    if getattr(model, "hf_quantizer", None) is not None:
        return bool(hooked)
    return len({str(hook.execution_device) for module in hooked for hook in hooks_of(module)}) == 1


def hooks_of(module: "nn.Module") -> list[Any]:
    """Return the module's own `AlignDevicesHook`s; `getattr` would find those of a module that PEFT has wrapped."""
    from accelerate.hooks import AlignDevicesHook

    hook = vars(module).get("_hf_hook")
    return [candidate for candidate in getattr(hook, "hooks", (hook,)) if isinstance(candidate, AlignDevicesHook)]


def _add(module: "nn.Module", device: int | str, model: "nn.Module", undo: ExitStack) -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    # Without a device for now, because accelerate would go through the tensors and put them there.
    hook = AlignDevicesHook(
        execution_device=None,
        io_same_device=module is model,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )
    _remember(module, undo)
    existing = vars(module).get("_hf_hook")
    if existing is not None:  # somebody else's, or what `_remove` has left
        module._hf_hook = SequentialHook(hook, existing)
    else:
        # Both given, or accelerate would take those of a module that this one wraps, and leave the wrapper out.
        vars(module).update(_hf_hook=hook, _old_forward=module.forward)
        add_hook_to_module(module, hook)
    hook.execution_device = device


def _remove(module: "nn.Module", undo: ExitStack) -> None:
    from accelerate.hooks import SequentialHook, remove_hook_from_module

    _remember(module, undo)
    held = module._hf_hook
    foreign = [attached for attached in getattr(held, "hooks", ()) if attached not in hooks_of(module)]
    # Only accelerate's own wrapper may be taken off: around it may be one of autocast, say.
    outermost = getattr(vars(module).get("forward"), "__wrapped__", None) is vars(module).get("_old_forward")
    if foreign or not outermost:
        module._hf_hook = SequentialHook(*foreign)
    else:
        remove_hook_from_module(module)


def _remember(module: "nn.Module", undo: ExitStack) -> None:
    """Register the way back to all attributes that the module has now: the hooks of accelerate are some of them."""
    attributes = vars(module)
    undo.callback(attributes.update, dict(attributes))
    undo.callback(attributes.clear)


def _has_weights(module: "nn.Module") -> bool:
    """Whether checkpoints contain a tensor of this module, which is accelerate's criterion."""
    return any(
        any(parameter is not None for parameter in inner._parameters.values())
        or any(name not in inner._non_persistent_buffers_set for name in inner._buffers)
        for inner in module.modules()
    )
