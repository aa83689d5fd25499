"""Memory that a training itself holds on each device, which a new plan for it may use."""

from typing import Any


def held_by(model: Any, optimizer: Any) -> dict[int, int]:
    """Return device index -> bytes of `model`, its gradients, and the state that `optimizer` (or None) has for it."""
    states = getattr(optimizer, "state", {})
    held: dict[int, int] = {}
    for parameter in model.parameters():
        if parameter.device.index is not None:
            size = parameter.numel() * parameter.element_size() * (1 if parameter.grad is None else 2) + state_bytes(
                states, parameter
            )
            held[parameter.device.index] = held.get(parameter.device.index, 0) + size
    for buffer in model.buffers():
        if buffer.device.index is not None:
            held[buffer.device.index] = held.get(buffer.device.index, 0) + buffer.numel() * buffer.element_size()
    return held


def state_bytes(states: Any, parameter: Any) -> int:
    """Return the bytes of optimizer state on the device of `parameter`; `states` is the `state` of an optimizer."""
    values = states[parameter].values() if parameter in states else ()
    return sum(
        value.numel() * value.element_size()
        for value in values
        if hasattr(value, "element_size")
        and value.device == parameter.device
        and not getattr(
            value, "is_paged", False
        )  # bitsandbytes: its device attribute is the accelerator, its memory the host's
    )
