"""Programs that start their ranks themselves, ms-swift and LLaMA-Factory: they are told how many in their own words."""

import os
from typing import Any

from .. import log, state
from ..units import counted
from ..zero.launching import relaunch, requirements


def apply(module: Any) -> None:
    """Set the variables that the launcher in `module` is about to read, unless the user has set them.

    Raises:
        BalanceError: ZeRO-3 is asked for and cannot be had.
    """
    if state.settings().mode != "zero3" or not relaunch.is_launcher():
        return
    if os.environ.get("NPROC_PER_NODE", "").strip() or os.environ.get("NNODES", "").strip():
        return
    requirements.check()
    count = relaunch.process_count()
    os.environ["NPROC_PER_NODE"] = str(count)
    if module.__name__.startswith("llamafactory"):
        os.environ["FORCE_TORCHRUN"] = "1"
    os.environ.update(relaunch.threads_for(count))
    log.info(f"{module.__name__.partition('.')[0]} starts {counted(count, 'process')} for ZeRO-3")
