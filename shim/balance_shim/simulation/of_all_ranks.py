"""The memory of simulated devices in all ranks of this machine, for the rank that ends last.

The ranks share no memory and may end at different times, so each leaves its figures in a file. A rank that fails, or
one whose neighbours have been killed, has nobody to wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

from ..replicas.ranks import LocalRank, local_rank
from ..virtual.ledger import DeviceUsage


def usage_of_all(own: tuple[DeviceUsage, ...]) -> tuple[DeviceUsage, ...] | None:
    """Return the peaks of all ranks added up by device; None where another rank will report them.

    A rank that ends by an exception returns its own devices.
    """
    rank = local_rank(os.environ)
    if rank is None or rank.count == 1:
        return own
    if hasattr(sys, "last_value"):
        return tuple(device for device in own if device.peak)
    folder = _folder()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{rank.index}.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump([device._asdict() for device in own], file)
    os.replace(path + ".part", path)
    return _collected(folder, rank)


def _collected(folder: str, rank: LocalRank) -> tuple[DeviceUsage, ...] | None:
    names = [f"{index}.json" for index in range(rank.count)]
    if not all(os.path.exists(os.path.join(folder, name)) for name in names):
        return None
    own_folder = f"{folder}.{os.getpid()}"
    try:
        os.rename(folder, own_folder)  # for one of those that see all files
    except OSError:
        return None
    try:
        ranks = []
        for name in names:
            with open(os.path.join(own_folder, name), encoding="utf-8") as file:
                ranks.append([DeviceUsage(**device) for device in json.load(file)])
    finally:
        shutil.rmtree(own_folder, ignore_errors=True)
    return tuple(_added(same) for same in zip(*ranks, strict=True))


def _added(same: Sequence[DeviceUsage]) -> DeviceUsage:
    """Return the sum of the ranks' memory on one device; peaks may have been at different times."""
    first = same[0]
    sums = {name: sum(getattr(usage, name) for usage in same) for name in DeviceUsage._fields[2:]}
    return first._replace(**sums)


def _folder() -> str:
    """Return a folder that the ranks of this run on this machine have in common: their launcher is their parent."""
    port = "".join(filter(str.isalnum, os.environ.get("MASTER_PORT", "")))
    attempt = "".join(filter(str.isalnum, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return os.path.join(tempfile.gettempdir(), f"balance_shim.ranks.{os.getppid()}.{port}.{attempt}")
