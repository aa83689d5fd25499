"""The device where a rank's inputs arrive: that of its number, unless its share of the devices does not have that one.

accelerate and `TrainingArguments` take device `LOCAL_RANK`. Once a model has been placed on a share without it, they
are given the share's first device. Until then nothing changes: ranks that load whole models keep their devices.
"""

import sys
from typing import Any

from .. import devices
from ..patching.guard import attempt

_home: int | None = None


def adopt(index: int) -> None:
    """Have this rank's inputs arrive on device `index` from now on."""
    global _home
    _home = index
    state_module = sys.modules.get("accelerate.state")
    if state_module is None:
        return
    for owner in (state_module.PartialState, state_module.AcceleratorState):
        if "device" in owner._shared_state:  # it has been made
            owner._shared_state["device"] = _device()
    _make_current()


def correct_state(partial_state: Any) -> None:
    """Give `partial_state`, accelerate's `PartialState` that has just chosen its device, the one adopted before."""
    if _home is not None and getattr(partial_state.device, "type", None) == devices.accelerator_type():
        partial_state.device = _device()
        _make_current()


def correct_arguments(arguments: Any) -> None:
    """Give `TrainingArguments` that know their device the one adopted since."""
    if _home is None:
        return
    # functools' name, and that of transformers' own cached_property (4.x).
    for name in ("_setup_devices", "__cached__setup_devices"):
        cached = vars(arguments).get(name)
        if cached is not None and cached.type == devices.accelerator_type():
            vars(arguments)[name] = _device()


def _device() -> Any:
    import torch

    kind = devices.accelerator_type()
    assert kind is not None and _home is not None, "a model has been placed on it"
    return torch.device(kind, _home)


def _make_current() -> None:
    import torch

    device = _device()
    attempt("making a device the current one", torch.get_device_module(device.type).set_device, device)
