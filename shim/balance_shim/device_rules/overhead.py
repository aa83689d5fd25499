"""Memory that the libraries of an accelerator allocate besides tensors."""

from ..units import MIB
from .kinds import Architecture

# Workspaces that cuBLAS and cuBLASLt, or hipBLAS and hipBLASLt, take through torch's allocator: one for each handle,
# of which training has two a device (the forward pass and autograd's thread); cuBLASLt's is shared.
# Source: aten/src/ATen/cuda/CublasHandlePool.cpp and CUDABlas.cpp of torch 2.13.
_HOPPER = 2 * 32 * MIB  # compute capability 9.0: 32 MiB a handle
_CUDA = 18 * MIB  # all others, Blackwell included: twice 8.1 MiB, and 1 MiB of cuBLASLt
_CDNA3 = 2 * (128 + 76) * MIB  # gfx94x and gfx95x: 128 MiB a handle, and 76 MiB of hipBLASLt
_HIP = 2 * (32 + 76) * MIB


def overhead_of(architecture: Architecture) -> int:
    """Return the bytes that libraries take on a device of this architecture, beyond its context and tensors.

    The context is there by the time that free memory can be asked for. 0 where it is not known (npu, xpu).
    """
    capability = architecture.capability
    if architecture.runtime == "hip":
        return _CDNA3 if capability in ((9, 4), (9, 5)) else _HIP
    if architecture.runtime == "cuda":
        return _HOPPER if capability in ((9, 0), None) else _CUDA
    return 0
