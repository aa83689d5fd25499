"""`simulation.json` in the report folder: the peak of each simulated device, allocated and reserved."""

import json
import os

from .. import simulation
from ..patching.guard import attempt

FILE = "simulation.json"


def write_at_exit(folder: str) -> None:
    """Write the record when this process ends; not when a child that it forks does."""
    import atexit

    atexit.register(attempt, f"writing {FILE}", _write, folder, os.getpid(), instead="there is no such file")


def _write(folder: str, process: int) -> None:
    # Neither a worker nor a process that only started the one that trains must overwrite that one's record.
    if not simulation.is_main_process(process) or not any(device.peak for device in simulation.usage()):
        return
    os.makedirs(folder, exist_ok=True)
    record = [
        {
            "name": device.name,
            "capacity": device.capacity,
            "peak": device.peak,
            "reserved_peak": device.peak_reserved,
        }
        for device in simulation.usage()
    ]
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
