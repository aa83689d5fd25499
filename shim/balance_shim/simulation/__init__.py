"""A machine with several accelerators, simulated on the CPU.

`install` gives torch devices that have no hardware: scripts with `device_map="auto"` run on them unmodified, with
real numbers or with shapes only, with a cap on the memory of each device. Importing this package does not import
torch.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from ..device_spec import SimulationSpec, parse_spec
from ..errors import SimulationError

if TYPE_CHECKING:
    from ..timing.clock import Clock
    from ..timing.step_time import StepTime
    from ..virtual.ledger import DeviceUsage
    from .installation import Installation

__all__ = [
    "SimulationSpec", "clock", "install", "is_active", "occupy", "parse_spec", "report_at_exit", "reset_peaks",
    "step_time", "usage",
]  # fmt: skip

_installation: Installation | None = None
_reporting = False


def install(spec: SimulationSpec) -> None:
    """Make the devices of `spec` the accelerators of this process, for the rest of its life.

    torch has to be imported. Doing it again for the same machine is allowed.

    Raises:
        SimulationError: this process has a real accelerator or a machine already, or this torch cannot do it.
    """
    global _installation
    if _installation is not None:
        if _installation.spec != spec:
            raise SimulationError(
                "a machine is already simulated in this process, and torch allows one per process; "
                "simulate one machine per run"
            )
        return
    from .installation import Installation

    _installation = Installation(spec)


def is_active() -> bool:
    """Whether devices are simulated in this process."""
    return _installation is not None


def usage() -> tuple[DeviceUsage, ...]:
    """Return name, capacity, live, peak and reserved bytes of each device; nothing without a simulation."""
    return _installation.machine.ledger.usage() if _installation else ()


def step_time() -> StepTime | None:
    """Return the time of a training step by the clock; None without kinds of devices, or before a step has ended."""
    timed = _installation.timed if _installation else None
    return None if timed is None else timed.of_a_step()


def clock() -> Clock | None:
    """Return the clock of the simulated devices; None where the kind of one is unknown."""
    timed = _installation.timed if _installation else None
    return None if timed is None else timed.clock


def reset_peaks() -> None:
    """Let the peaks start again from the memory live now."""
    if _installation is not None:
        for index in range(len(usage())):
            _installation.machine.ledger.reset_peak(index)


def occupy(index: int, others: int) -> None:
    """Let other processes use `others` bytes of simulated device `index` from now on.

    Nothing in a training does that here by itself; it is for trying out what happens then.
    """
    if _installation is not None:
        _installation.machine.ledger.occupy(index, others)


def report_at_exit(folder: str | None = None) -> None:
    """Write the peaks to standard error when the program ends, however it ends; only its main process does.

    Of several ranks the one that ends last writes those of all.

    Args:
        folder: where `simulation.json` is written, if anywhere.
    """
    global _reporting
    if not _reporting:
        _reporting = True
        atexit.register(_report, os.getpid(), folder)


def _report(process: int, folder: str | None) -> None:
    # Neither a worker nor a process that only started the one that trains (ms-swift's command) has anything to report.
    if not is_main_process(process) or not any(device.peak for device in usage()):
        return
    from ..patching.guard import attempt
    from ..replicas.ranks import local_rank
    from . import of_all_ranks, record, report

    action, instead = "collecting the peaks of all ranks", "these are those of one rank"
    peaks = attempt(action, of_all_ranks.usage_of_all, usage(), default=usage(), instead=instead)
    if peaks is None:
        return
    # The clock is that of one process: of several ranks it knows neither the slowest nor what they send each other.
    rank = local_rank(os.environ)
    time = step_time() if rank is None or rank.count == 1 else None
    report.write(peaks, time)
    if folder is not None:
        attempt(f"writing {record.FILE}", record.write, folder, peaks, time, instead="there is no such file")


def is_main_process(process: int) -> bool:
    """Whether this process is still number `process`, not forked from it, and no worker of another.

    To be asked at the end: a spawned worker runs the script's top level before it learns that it is one. A process that
    never imported multiprocessing is none.
    """
    workers = sys.modules.get("multiprocessing.process")
    spawned = workers is not None and workers.parent_process() is not None
    return os.getpid() == process and not spawned
