"""`simulation.json` in the report folder: the peak of each simulated device, allocated and reserved."""

import json
import os

from ..virtual.ledger import DeviceUsage

FILE = "simulation.json"


def write(folder: str, usage: tuple[DeviceUsage, ...]) -> None:
    """Write the record of `usage` into `folder`, which is made if need be."""
    os.makedirs(folder, exist_ok=True)
    record = [
        {
            "name": device.name,
            "capacity": device.capacity,
            "peak": device.peak,
            "reserved_peak": device.peak_reserved,
        }
        for device in usage
    ]
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
