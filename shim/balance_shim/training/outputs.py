"""Outputs of a model on several devices come back to the device of its inputs, whoever has replaced its `forward`.

accelerate does this in the wrapper that it puts around `model.forward`. A trainer that replaces `forward` drops the
wrapper: TRL 1.16 does (`trl.trainer.utils.add_fused_lm_head`), and its per-token quantities stay on the head's device.
A forward hook of the module survives that.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import devices, state
from ..patching.guard import attempt

if TYPE_CHECKING:
    from torch import nn

MOST_LEVELS = 6  # of containers in containers that are looked through


def arm(*models: Any) -> None:
    """Register the hook on each of `models` that spans several devices, unless it has it already.

    A wrapper around such a model (PEFT's) needs the hook too: it calls `forward` of what it wraps, not the module.
    """
    for model in models:
        if model is None or _return_outputs in model._forward_hooks.values() or not _spans_devices(model):
            continue
        model.register_forward_hook(_return_outputs, with_kwargs=True)


def _spans_devices(model: "nn.Module") -> bool:
    kind = devices.accelerator_type()
    return (
        kind is not None
        and len({parameter.device for parameter in model.parameters() if parameter.device.type == kind}) > 1
    )


def _return_outputs(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Return `output` with its tensors on the device of the first tensor among the inputs; None where they are there.

    As accelerate's `AlignDevicesHook.post_forward` with `io_same_device`, keys that the model excludes included.
    """
    if not state.enabled():
        return None
    first_device = next(_tensors((args, kwargs)), None)
    if first_device is None or first_device.device.type == "meta":
        return None
    skipped = getattr(module, "_skip_keys_device_placement", None) or ()
    skipped = {skipped} if isinstance(skipped, str) else set(skipped)
    moved = attempt(
        "bringing outputs back",
        _moved,
        output,
        first_device.device,
        skipped,
        default=output,
        instead="they stay as they are",
    )
    return None if moved is output else moved


def _moved(value: Any, device: Any, skipped: Collection[str], levels: int = MOST_LEVELS) -> Any:
    """Return `value` with the tensors in it on `device`; the same object where nothing has to move."""
    import torch

    if isinstance(value, torch.Tensor):
        return value if value.device in (device, torch.device("meta")) else value.to(device)
    if not levels:
        return value
    if isinstance(value, Mapping):
        changes = {key: moved for key, item in value.items() if key not in skipped
                   and (moved := _moved(item, device, skipped, levels - 1)) is not item}  # fmt: skip
        return _with_items(value, changes) if changes else value
    if isinstance(value, (tuple, list)):
        items = [_moved(item, device, skipped, levels - 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        before = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        changed = {name: moved for name, item in before.items() if name not in skipped
                   and (moved := _moved(item, device, skipped, levels - 1)) is not item}  # fmt: skip
        return replace(value, **changed) if changed else value
    return value


def _with_items(value: Any, changes: Mapping[Any, Any]) -> Any:
    """Return `value` with these items changed.

    transformers' `ModelOutput` is both mapping and object, and may carry attributes of its own: changed in place.
    """
    if not is_dataclass(value):
        return type(value)({**value, **changes})
    output: Any = value
    for key, moved in changes.items():
        output[key] = moved
    return output


def _tensors(value: Any, levels: int = MOST_LEVELS) -> Iterator[Any]:
    """Yield the tensors in `value`, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif levels and isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, levels - 1)
