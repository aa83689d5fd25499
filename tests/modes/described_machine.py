"""Run a script as on a machine with two H100 of `DESCRIBED` bytes each: only the inventory is replaced.

Mode `auto` chooses by its own prediction for these devices. Ranks that it starts see the machine as it is, so ZeRO-3
trains on the CPU, in real processes.
"""

import os
import runpy
import sys

from balance_shim import devices
from balance_shim.device import describe
from balance_shim.device_rules.kinds import kind_named

if "RANK" not in os.environ:
    SIZE, KIND = int(os.environ["DESCRIBED"]), kind_named("H100")

    def inventory(settings, *_, **__):
        # A name that is not CUDA's: no context takes memory, and no reserve of 768 MiB is kept.
        return tuple(describe(index, f"npu:{index}", SIZE, settings, KIND.architecture, KIND) for index in range(2))

    devices.inventory = inventory
    devices.totals = lambda settings: dict.fromkeys(range(2), SIZE)
    devices.count = lambda: 2

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
