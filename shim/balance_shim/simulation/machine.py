"""The one simulated machine of this process: its devices, their memory, and which of them is current."""

import torch

from .memory import Ledger
from .spec import SimulationSpec

# Trainers support the name "npu" natively, with integer device ids; a name of our own would mean patching all of them.
BACKEND = "npu"


class Machine:
    """Devices as torch knows them. Exists once a backend named `BACKEND` is registered, not before."""

    def __init__(self, spec: SimulationSpec):
        self.spec = spec
        self.shapes_only = spec.shapes_only
        self.devices = tuple(torch.device(BACKEND, index) for index in range(len(spec.capacities)))
        self.ledger = Ledger(tuple(map(str, self.devices)), spec.capacities)
        self.current = 0

    def index_of(self, device: "torch.device | str | int | None") -> int:
        """Return the index that `device` means here; no device or no index means the current one.

        Raises:
            RuntimeError: there is no such device, worded as CUDA does.
        """
        if device is None:
            return self.current
        if not isinstance(device, int):
            device = torch.device(device)
            if device.type != BACKEND:
                raise ValueError(f"expected a device of type {BACKEND}, got {device}")
            device = self.current if device.index is None else device.index
        if not 0 <= device < len(self.devices):
            raise RuntimeError(
                f"invalid device ordinal: {BACKEND}:{device}; this simulated machine has {len(self.devices)} devices"
            )
        return device
