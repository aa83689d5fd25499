"""The ranks of this machine, and which of its devices are this rank's."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .. import devices, log, state
from ..units import counted
from ..upstream import accelerate_launch
from .links import fast_links
from .shares import Share, divide

# Of each launcher: this process among those of its machine, and how many these are. torchrun, accelerate and ms-swift;
# deepspeed; Open MPI; MVAPICH2; Intel MPI.
_NAMES = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class LocalRank:
    """This process among the `count` processes that a launcher has started on this machine, counted from 0."""

    index: int
    count: int


def local_rank(environ: Mapping[str, str]) -> LocalRank | None:
    """Return the local rank of this process; None if no launcher has set one."""
    for name, name_of_count in _NAMES:
        index, count = _number(environ.get(name)), _number(environ.get(name_of_count))
        if index is not None and count is not None and index < count:
            return LocalRank(index, count)
    local, tasks = _number(environ.get("SLURM_LOCALID")), _tasks_here(environ)
    if local is not None and tasks is not None and local < tasks:
        return LocalRank(local, tasks)
    # A launcher that names ranks only: all of them are on this machine, as far as anybody can tell.
    local, world = _number(environ.get("LOCAL_RANK")), _number(environ.get("WORLD_SIZE"))
    return LocalRank(local, world) if local is not None and world is not None and local < world else None


def world_size(environ: Mapping[str, str]) -> int:
    """Return the number of ranks on all machines; 1 without a launcher."""
    # ms-swift takes WORLD_SIZE away while it loads a model, for the sake of transformers 4.50 to 4.53.
    text = environ.get("WORLD_SIZE") or environ.get("_PATCH_WORLD_SIZE") or "1"
    return int(text) if text.isdigit() else 1


def has_own_devices() -> bool:
    """Return whether no other rank uses the devices on which this process places models."""
    rank = local_rank(os.environ)
    if world_size(os.environ) == 1 or own_share() is not None:
        return True
    alone = sees_own_devices(os.environ) or (rank is not None and rank.count == 1)
    return alone and not spreads_otherwise(os.environ)


def sees_own_devices(environ: Mapping[str, str]) -> bool:
    """Return whether SLURM shows this process devices that no other task sees."""
    return bool(environ.get("SLURM_GPUS_PER_TASK", "").strip()) or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")


def spreads_otherwise(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher was asked for another way to spread a model, such as FSDP."""
    ways = (accelerate_launch.DEEPSPEED, *accelerate_launch.OTHER_WAYS)
    return any(accelerate_launch.asks_for(variable, environ) for variable in ways)


def own_share() -> Share | None:
    """Return the devices of this rank, the one where its inputs arrive first.

    None where there are no shares: no launcher has started several ranks here, SLURM shows each its own devices, there
    are fewer devices than ranks, or the launcher spreads models in another way.

    Total memory decides, not free memory, which changes while other ranks load: all ranks get the same result.
    """
    rank = local_rank(os.environ)
    if rank is None or rank.count == 1 or sees_own_devices(os.environ) or spreads_otherwise(os.environ):
        return None
    return _share(rank)


def all_shares(ranks: int) -> tuple[Share, ...]:
    """Return the shares of the devices of this machine among `ranks`; empty where there are more ranks than devices.

    The devices are those that ranks would use, without display cards: a plan of one process may have more of them.
    """
    totals = devices.totals(state.settings())
    return divide(totals, ranks, fast_links(tuple(totals))) if ranks <= len(totals) else ()


@lru_cache(maxsize=1)
def _share(rank: LocalRank) -> Share | None:
    count = len(devices.totals(state.settings()))
    if count < rank.count:
        if count > 1:
            log.once(
                "info", f"{counted(rank.count, 'rank')} for {counted(count, 'device')}: none gets a share of its own"
            )
        return None
    return all_shares(rank.count)[rank.index]


def announce() -> None:
    """Log, once, which devices each rank of this machine has."""
    rank = local_rank(os.environ)
    assert rank is not None, "there are shares"
    shares, kind = all_shares(rank.count), devices.accelerator_type()
    parts = [f"rank {index} on {kind}:{'+'.join(map(str, share))}" for index, share in enumerate(shares)]
    log.once("info", f"replicas: {', '.join(parts)}")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Return how many tasks `srun` has started on this node; None where it has started none.

    SLURM writes the numbers of all nodes of the step: "4(x2),3" are 4, 4 and 3.
    """
    node = _number(environ.get("SLURM_NODEID"))
    written = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if node is None or not written:
        return None
    numbers: list[int] = []
    for part in written.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers[node] if node < len(numbers) else None
