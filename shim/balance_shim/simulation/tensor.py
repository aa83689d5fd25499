"""The tensors of a simulated machine."""

from typing import Any

import torch
from torch.types import Device

from ..virtual.tensor import VirtualTensor

# Trainers support the name "npu" natively, with integer device ids; a name of our own would mean patching all of them.
BACKEND = "npu"


class SimulatedTensor(VirtualTensor):
    """A tensor on a device of the one simulated machine of this process."""

    def new_tensor(self, data: Any, *, device: Device = None, **options: Any) -> torch.Tensor:  # type: ignore[override]
        # Of a backend without a driver torch takes only the type of the device from `self`, not the index.
        return super().new_tensor(data, device=self.device if device is None else device, **options)
