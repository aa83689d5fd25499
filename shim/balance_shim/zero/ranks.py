"""The environment of a rank: variables that launchers leave out, and an orderly end."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import MutableMapping

from .. import zero_support
from . import meeting
from .launching.relaunch import steps_of_slurm

LAUNCHER_PROCESS = "BALANCE_SHIM_LAUNCHER"  # the launcher's variable: its process number


def complete_environment(environ: MutableMapping[str, str]) -> None:
    """Set the variables that `torch.distributed` reads and the launcher has not set.

    `srun` and `mpirun` start the tasks and tell them who they are in variables of their own.

    Raises:
        BalanceError: it is not known where the ranks meet.
    """
    names: dict[str, str] = {}
    if steps_of_slurm(environ) > 1:
        rank, local = environ["SLURM_PROCID"], environ.get("SLURM_LOCALID", "0")
        names = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": str(steps_of_slurm(environ))}
    else:
        for kind in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "PMI"):
            if f"{kind}_RANK" in environ and f"{kind}_SIZE" in environ:
                local = environ.get(f"{kind}_LOCAL_RANK", "0")
                names = {"RANK": environ[f"{kind}_RANK"], "LOCAL_RANK": local, "WORLD_SIZE": environ[f"{kind}_SIZE"]}
                break
    for name, value in names.items():
        environ.setdefault(name, value)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""
    if "MASTER_ADDR" not in environ and nodes:
        environ["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_ADDR" not in environ and environ.get("WORLD_SIZE", "1") == environ.get("LOCAL_WORLD_SIZE", "1"):
        environ["MASTER_ADDR"] = "127.0.0.1"
    job = environ.get("SLURM_JOB_ID", "")
    environ.setdefault("MASTER_PORT", str(20000 + int(job) % 20000) if job.isdigit() else "29500")
    environ.setdefault("RANK", "0")
    environ.setdefault("LOCAL_RANK", environ["RANK"])
    environ.setdefault("WORLD_SIZE", "1")
    if "MASTER_ADDR" not in environ:
        raise zero_support.refusal("mpirun", rank=environ["RANK"], size=environ["WORLD_SIZE"])


def use_visible_device(environ: MutableMapping[str, str], count: int) -> None:
    """Have this rank use the device that it sees, where its launcher shows each rank one device only.

    `srun --gpus-per-task=1`, `--gpu-bind=single:1` and containers do so, and still number the ranks of a machine from 0
    on. Open MPI's own variable goes along, because DeepSpeed's engine compares the two. To be called before DeepSpeed
    is imported.

    Args:
        count: how many devices this process sees; 0 for none.

    Raises:
        BalanceError: there are several devices, but fewer than ranks on this machine.
    """
    local = environ.get("LOCAL_RANK", "0")
    if count == 0 or not local.isdigit() or int(local) < count:
        return
    if count > 1:
        raise zero_support.refusal("ranks_above_devices", processes=int(local) + 1, devices=count)
    environ["LOCAL_RANK"] = "0"
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it: "gpu[003-007,9],login" -> "gpu003"."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    numbers, _, _ = rest.partition("]")
    return name + numbers.replace("-", ",").partition(",")[0]


def leave_group_at_exit() -> None:
    """Have this rank leave its process group before the interpreter goes.

    gloo's threads may abort a process that does not; NCCL warns (torch 2.4 on), and work in flight may hang the end. A
    rank that fails must not wait for others in there.
    """

    def leave() -> None:
        import torch.distributed as dist

        if dist.is_initialized() and getattr(sys, "last_value", None) is None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                meeting.leave()
            # Before and after: what waits to be collected, an operation or a group, would otherwise be let go of by a
            # thread of gloo's while the interpreter ends, which aborts the process (seen once on a crowded machine).
            gc.collect()
            dist.destroy_process_group()
            gc.collect()

    atexit.register(leave)


def die_with_launcher() -> None:
    """Have the kernel end this rank when its launcher is killed by a signal that it cannot pass on."""
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes
    import signal

    parent_dies = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_dies, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER_PROCESS, "")
    if launcher.isdigit() and os.getppid() != int(launcher):  # it was killed before: nobody would tell us any more
        os.kill(os.getpid(), signal.SIGTERM)
