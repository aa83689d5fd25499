"""The tensors of a simulated machine."""

from balance_shim.virtual.tensor import VirtualTensor

# Trainers support the name "npu" natively, with integer device ids; a name of our own would mean patching all of them.
BACKEND = "npu"


class SimulatedTensor(VirtualTensor):
    """A tensor on a device of the one simulated machine of this process."""
