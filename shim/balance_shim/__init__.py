"""Use the memory of all GPUs when you train, without changing the training script.

Importing this package arms the shim, unless `BALANCE_MODE=off`. Three kinds of importers differ, and `arming`
tells them apart by the state of the interpreter, so that none of them has to announce itself:

* A script: mode `balanced` unless the environment sets another one, and a `SettingError` is raised here.
* An interpreter that is starting, from a `sitecustomize`: nothing may be raised there, so that waits until a model is
  loaded; and `BALANCE_SIMULATE` alone does not imply a mode.
* Our own command, `balance-shim` or `python -m balance_shim`: never armed, because it only starts other programs or
  prints. It imports this file before any code of its own runs, so it is known by its command line.

Standard library only, and little of that: torch, transformers and even `typing` are not imported here.
"""

from __future__ import annotations

from .arming import arm_on_import, install, status, uninstall
from .errors import (
    BalanceError,
    DeviceMapError,
    LostModelError,
    ModelError,
    MoveError,
    ReplicaError,
    SettingError,
    SimulationError,
    UsageError,
    ZeroError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .placement.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "BalanceError",
    "DeviceMapError",
    "LostModelError",
    "ModelError",
    "MoveError",
    "ReplicaError",
    "SettingError",
    "SimulationError",
    "UsageError",
    "ZeroError",
    "__version__",
    "install",
    "plan",
    "status",
    "uninstall",
]


def plan(model: Any, devices: str = "", **workload: Any) -> Plan:
    """Plan the training of a model on devices that need not exist; see `balance_shim.planning.plan`."""
    from .planning import plan as made

    return made(model, devices, **workload)


arm_on_import()
