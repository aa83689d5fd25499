"""Resuming checkpoints of another number of processes, by DeepSpeed's universal format."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

from .. import log, zero_support
from ..units import counted
from . import process_group

_SHARD = re.compile(
    r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt|bf16_zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt"
)
POLL = 0.5  # seconds
_conversions = 0  # so far; ranks count alike
_converted: "WeakSet[Any]" = WeakSet()  # engines that have loaded a universal checkpoint because of us


def prepare(engine: Any, folder: str) -> None:
    """Have `engine` load the checkpoint in `folder` whichever number of processes wrote it.

    Where that differs from now, the first process converts it once, next to the original.

    Raises:
        BalanceError: it cannot be converted.
    """
    import torch.distributed as dist

    step = newest_step(Path(folder))
    if step is None:
        return  # transformers reports what is missing
    wrote = shards(step)
    if wrote in (0, dist.get_world_size()):
        if engine in _converted:  # the best checkpoint of this training, say, after it began with another one
            engine._config.load_universal_checkpoint = False
        return
    universal = step.with_name(f"{step.name}_universal")
    done = Path(folder, "latest_universal")  # DeepSpeed writes it last
    failure = _first_rank_converts(step, universal, is_there=universal.is_dir() and done.exists(), folder=folder)
    if failure:
        raise zero_support.refusal(
            "unconvertible", folder=folder, wrote=counted(wrote, "process"), processes=dist.get_world_size(),
            reason=failure, processes_then=wrote,
        )  # fmt: skip
    engine._config.load_universal_checkpoint = True
    _converted.add(engine)


def _first_rank_converts(step: Path, universal: Path, is_there: bool, folder: str) -> str:
    """Return, on all ranks, why the checkpoint could not be converted; "" if it could.

    The others ask the store now and then. A collective operation would end with the time-out of the process group,
    while the conversion of a large model takes hours.
    """
    global _conversions
    import torch.distributed as dist

    _conversions += 1
    store, key = process_group.store(), f"balance_shim/conversion/{_conversions}"
    if dist.get_rank() == 0:
        failure = None
        if not is_there:
            wrote = shards(step)
            log.info(
                f"{folder} was written by {counted(wrote, 'process')}; it is converted for {dist.get_world_size()}"
            )
            failure = _convert(step, universal)
        store.set(key, failure or "")
    while not store.check([key]):
        time.sleep(POLL)
    answer: bytes = store.get(key)
    return answer.decode()


def newest_step(folder: Path) -> Path | None:
    """Return the folder of DeepSpeed's shards in a Trainer's checkpoint, None where there is none."""
    latest = folder / "latest"
    if not latest.is_file():
        return None
    step = folder / latest.read_text().strip()
    return step if step.is_dir() else None


def shards(step: Path) -> int:
    """Return the number of processes that wrote the optimizer's state in `step`."""
    return len(
        {next(filter(None, match.groups())) for file in step.iterdir() if (match := _SHARD.fullmatch(file.name))}
    )


def _convert(step: Path, universal: Path) -> str | None:
    """Convert the checkpoint; return an error's last line, or None."""
    environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(step),
         "--output_folder", str(universal), "--num_extract_workers", "1", "--num_merge_workers", "1"],
        env={**environment, "BALANCE_MODE": "off"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
