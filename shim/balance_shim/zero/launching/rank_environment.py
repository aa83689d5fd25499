"""Variables that ranks on accelerators get from our launcher, and from no other: where nobody has set them."""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from ... import devices
from ...patching.guard import attempt

SMALLEST_DEVICE = "BALANCE_SHIM_SMALLEST_DEVICE"  # bytes of the smallest device that a rank may get
EVENTS = 2000  # collective operations that the flight recorder keeps, as torch's own default from 2.9 on
RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # from torch 2.9 on, and before
RECORD_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # likewise; a rank's number is added


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ranks in addition to `environ`; none without accelerators."""
    kind = devices.accelerator_type()
    if kind is None:
        return {}
    added = flight_recorder(environ) if kind == "cuda" else {}
    smallest = attempt("reading the size of the devices", _smallest, kind, default=0)
    return {**added, SMALLEST_DEVICE: str(smallest)} if smallest else added


def flight_recorder(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make NCCL's process groups write their last operations to files at a time-out.

    Source: torch's "ProcessGroupNCCL Environment Variables". A size of 0 that somebody has set stays.
    """
    added = {}
    if not any(environ.get(name, "").strip() for name in RECORDER):
        added = dict.fromkeys(RECORDER, str(EVENTS))
    if not environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT", "").strip():
        added["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    if not any(environ.get(name, "").strip() for name in RECORD_FILES):
        added |= dict.fromkeys(RECORD_FILES, record_prefix(os.getpid()))
    return added


def record_prefix(launcher: int) -> str:
    """Return the path, but for the rank's number, where ranks of the process `launcher` leave NCCL's records."""
    return os.path.join(tempfile.gettempdir(), f"balance_shim.{launcher}.nccl_trace_rank_")


def _smallest(kind: str) -> int:
    """Return the bytes of memory of the smallest device; 0 where the runtime does not tell."""
    import torch

    module: Any = torch.get_device_module(kind)
    return min(int(module.get_device_properties(index).total_memory) for index in range(module.device_count()))
