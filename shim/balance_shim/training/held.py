"""Memory that a training itself holds on each device, which a new plan for it may use."""

from typing import Any


def held_by(model: Any, optimizer: Any) -> dict[int, int]:
    """Return device index -> bytes of `model`, its gradients, and the state that `optimizer` (or None) has for it."""
    states = getattr(optimizer, "state", {})
    held: dict[int, int] = {}
    for each in model.parameters():
        if each.device.index is not None:
            size = each.numel() * each.element_size() * (1 if each.grad is None else 2) + state_bytes(states, each)
            held[each.device.index] = held.get(each.device.index, 0) + size
    for each in model.buffers():
        if each.device.index is not None:
            held[each.device.index] = held.get(each.device.index, 0) + each.numel() * each.element_size()
    return held


def state_bytes(states: Any, parameter: Any) -> int:
    """Return the bytes of optimizer state on the device of `parameter`; `states` is the `state` of an optimizer."""
    values = states[parameter].values() if parameter in states else ()
    return sum(
        each.numel() * each.element_size()
        for each in values
        if hasattr(each, "element_size")
        and each.device == parameter.device
        and not getattr(
            each, "is_paged", False
        )  # bitsandbytes: its device attribute is the accelerator, its memory the host's
    )
