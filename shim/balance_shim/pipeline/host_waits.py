"""Where the host waits for a device in a forward pass, which keeps the next micro-batch from starting meanwhile."""

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
}  # of a device's tensor, which the host needs to go on
_OURS = ("/torch/", "/balance_shim/", "/accelerate/hooks.py")


class HostWaits(TorchDispatchMode):
    """Notes the first operation that waits for a device once the forward pass has left the first one.

    Waiting for the first device before that (for the sizes of pictures, or a mask) costs little: it only has to do with
    the same micro-batch.

    Attributes:
        place: "FILE:LINE" of the code that waits; "" if none does.
        device: for which it waits.
    """

    def __init__(self, first_device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._first_device = first_device
        self._has_left = False
        self.place, self.device = "", ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = (
            None if self.place else next((argument for argument in args if isinstance(argument, torch.Tensor)), None)
        )
        if source is not None and source.device.type == self._first_device.type:
            self._has_left = self._has_left or source.device != self._first_device
            name = func.overloadpacket.__name__
            if self._has_left and (name in _READS or (name == "_to_copy" and _on_host((kwargs or {}).get("device")))):
                self.place, self.device = _place(), str(source.device)
        return func(*args, **(kwargs or {}))


def _on_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename.replace("\\", "/")
        if not any(part in name for part in _OURS):
            return f"{'/'.join(name.split('/')[-3:])}:{frame.lineno}"
    return "unknown code"
