"""Memory of other processes on a device, and this process's memory outside of torch's allocator, from NVML."""

import os
from typing import Any

from ..units import MIB, format_size

# A context with the kernels that load lazily; 0.3 to 0.5 GiB on devices of today. Not measured on a device yet.
CONTEXT = {"cuda": 512 * MIB}


def processes_on(kind: str, index: int) -> str:
    """Return "process 4711 with 3.2 GiB" for each other process on a CUDA device; "" where that cannot be known."""
    running = [process for process in _running(kind, index) if process.pid != os.getpid()]
    return ", ".join(map(_described, running))


def outside_allocator(kind: str, index: int, reserved: int) -> tuple[int, bool]:
    """Return the bytes of this process on a device that torch's allocator does not count, and whether that is exact.

    That is its context, kernels and communication buffers. Exact where NVIDIA's library names this process. In a
    container it does not, because it knows processes by the host's numbers; then an allowance for the context.

    Args:
        reserved: what the allocator has from the device.
    """
    for process in _running(kind, index):
        if process.pid == os.getpid() and process.usedGpuMemory:
            return max(0, int(process.usedGpuMemory) - reserved), True
    allowance = CONTEXT.get(kind, 0)
    return allowance, not allowance


def busy_share(kind: str, index: int) -> float | None:
    """Return the share of NVML's last sample period in which a device computed, for any process; None: not known."""
    if kind != "cuda":
        return None
    try:
        import pynvml

        return float(pynvml.nvmlDeviceGetUtilizationRates(_handle(index)).gpu) / 100
    except Exception:
        return None


def paged_state(optimizer: Any) -> dict[int, int]:
    """Return the bytes of paged optimizer state for each device.

    bitsandbytes keeps it in managed memory, which is on the device while there is room, and is not torch's. Its tensors
    are on the host for torch, and carry the device that pages them in.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    sizes: dict[int, int] = {}
    if not getattr(optimizer, "is_paged", False):
        return sizes
    for state in optimizer.state.values():
        for value in state.values():
            if getattr(value, "is_paged", False):
                index = int(getattr(value, "page_deviceid", 0) or 0)
                sizes[index] = sizes.get(index, 0) + value.numel() * value.element_size()
    return sizes


def _running(kind: str, index: int) -> list[Any]:
    """Return the processes on a device as NVML lists them; none where NVML is missing or not permitted."""
    if kind != "cuda":
        return []
    try:
        import pynvml

        return list(pynvml.nvmlDeviceGetComputeRunningProcesses(_handle(index)))
    except Exception:
        return []


def _handle(index: int) -> Any:
    """Return NVML's handle of a CUDA device."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    # By its identity: CUDA_VISIBLE_DEVICES gives devices other numbers than NVML does.
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def _described(process: Any) -> str:
    used = process.usedGpuMemory
    return f"process {process.pid}" + (f" with {format_size(used)}" if used else "")
