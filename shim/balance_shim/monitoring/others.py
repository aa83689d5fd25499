"""Who else uses a device: NVIDIA's management library knows, where it is installed."""

import os
from typing import Any


def processes_on(kind: str, index: int) -> str:
    """Return "process 4711 with 3.2 GiB" for each other process on a CUDA device; "" where that cannot be known."""
    if kind != "cuda":
        return ""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # By its identity: CUDA_VISIBLE_DEVICES gives devices other numbers than NVML does.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        running = [each for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if each.pid != os.getpid()]
    except Exception:  # not installed, or not allowed: the figures are known without it
        return ""
    return ", ".join(map(_described, running))


def _described(process: Any) -> str:
    from ..units import format_size

    used = process.usedGpuMemory
    return f"process {process.pid}" + (f" with {format_size(used)}" if used else "")
