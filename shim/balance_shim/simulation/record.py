"""`simulation.json` in the report folder: the peaks of each device, allocated and reserved, and its busy share.

`step_time.json` has the time of a step, where the kind of each device is known.
"""

import json
import os

from ..timing.step_time import StepTime
from ..virtual.ledger import DeviceUsage

FILE = "simulation.json"
STEP_TIME = "step_time.json"


def write(folder: str, usage: tuple[DeviceUsage, ...], step_time: StepTime | None = None) -> None:
    """Write the record of `usage` into `folder`, which is made if need be."""
    os.makedirs(folder, exist_ok=True)
    record = [
        {
            "name": device.name,
            "capacity": device.capacity,
            "peak": device.peak,
            "reserved_peak": device.peak_reserved,
            "busy": None if step_time is None else step_time.busy[index],
        }
        for index, device in enumerate(usage)
    ]
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
    if step_time is not None:
        with open(os.path.join(folder, STEP_TIME), "w", encoding="utf-8") as file:
            json.dump(step_time.to_json(), file, indent=2)
