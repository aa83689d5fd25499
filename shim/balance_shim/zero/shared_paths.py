"""A script's folders, on which all ranks have to agree.

One program has become several. `tempfile.mkdtemp()` and names with the time of day then differ from rank to rank, while
the Trainer has ranks read what the first one has written. So all ranks take over the folders in the first one's
`TrainingArguments`. A model that is not partitioned, on the other hand, is written by each rank that has its own folder
for it, because the script goes on to load it from there.
"""

import contextlib
import json
import os
import time
from datetime import timedelta
from typing import Any

from .. import log
from ..upstream.trainer import TrainingArgumentsLike
from . import process_group

FOLDERS = ("output_dir", "logging_dir", "run_name")  # of `TrainingArguments`, which not all versions have
PATIENCE = 60.0  # seconds that the other ranks wait for the first one
POLL = 0.05  # seconds

_arguments_made = 0
_models_saved = 0


def use_folders_of_first_rank(arguments: TrainingArgumentsLike) -> None:
    """Put the first rank's folders into `arguments`, which every rank is making now.

    The number of the call is what ranks tell each other by; one that makes more arguments than the first rank keeps its
    own folders, after a while and with a warning.
    """
    global _arguments_made
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _arguments_made += 1
    store, key = process_group.store(), f"balance_shim/folders/{_arguments_made}"
    folders = {name: getattr(arguments, name) for name in FOLDERS if isinstance(getattr(arguments, name, None), str)}
    if dist.get_rank() == 0:
        store.set(key, json.dumps(folders))
        return
    try:
        store.wait([key], timedelta(seconds=PATIENCE))
    except RuntimeError:  # torch.distributed.DistStoreError, a time-out
        log.warning(
            f"rank 0 has not made its TrainingArguments within {PATIENCE:.0f} s; rank {dist.get_rank()} keeps its own "
            "output_dir. Let every rank make the same TrainingArguments"
        )
        return
    first_rank_folders = json.loads(store.get(key))
    for name, value in first_rank_folders.items():
        if value != folders.get(name, value):
            log.debug(f"rank {dist.get_rank()}: {name}={value!r} of rank 0 instead of {folders[name]!r}")
            setattr(arguments, name, value)


def writes_itself(path: Any) -> bool:
    """Return whether this rank has to write a model to `path`, because the first rank writes another folder.

    Ranks come here in the same order, as far as the first one is among them; for one that is not, the others wait a
    while, and write then.
    """
    global _models_saved
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    _models_saved += 1
    store, folder = process_group.store(), os.path.realpath(os.fspath(path))
    if dist.get_rank() == 0:
        store.set(f"balance_shim/saves/{folder}", "1")
        store.set(f"balance_shim/saves/{_models_saved}", "1")
        return True
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if store.check([f"balance_shim/saves/{folder}"]):
            return False
        if store.check([f"balance_shim/saves/{_models_saved}"]):
            break
        time.sleep(POLL)
    return True


def has_written(path: Any) -> None:
    """Tell the other ranks, if this is the first one, that what it has saved at `path` can be read."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_rank() == 0:
        process_group.store().set(f"balance_shim/written/{os.path.realpath(os.fspath(path))}", "1")


def wait_until_written(path: Any) -> None:
    """Go on once the first rank has written to `path`: what the script does next may need the files."""
    with contextlib.suppress(RuntimeError):  # it takes longer, or fails, which ends this rank as well
        written = f"balance_shim/written/{os.path.realpath(os.fspath(path))}"
        process_group.store().wait([written], timedelta(seconds=PATIENCE))
