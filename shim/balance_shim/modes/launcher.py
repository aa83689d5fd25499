"""Mode `zero3` in a process that starts the ranks itself, such as `trl sft` or `swift sft`: nothing trains in it."""

import os
import sys
from typing import Any

from .. import log, zero_support
from ..units import counted
from ..zero.launching import relaunch, requirements
from .base import Mode, Original


class Launcher(Mode):
    """Tells programs with launchers of their own how many ranks to start."""

    def before_launcher(self, program: str) -> None:
        """Set the variables that the launcher reads, unless the user has set them.

        LLaMA-Factory (0.9.5) starts ranks for several devices only, and trains in its own process otherwise. It is told
        to start them on one device and on the CPU too: one, if the user says so.

        Raises:
            BalanceError: ZeRO-3 is asked for and cannot be had.
        """
        if program == "llamafactory":
            os.environ["FORCE_TORCHRUN"] = "1"
        if os.environ.get("NPROC_PER_NODE", "").strip() or os.environ.get("NNODES", "").strip():
            return
        requirements.check()
        count = relaunch.process_count()
        os.environ["NPROC_PER_NODE"] = str(count)
        os.environ.update(relaunch.threads_for(count))
        log.info(f"{program} starts {counted(count, 'process')} for ZeRO-3")

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `cls.from_pretrained`."""
        log.once("warning", f"BALANCE_MODE=zero3 does not act in {sys.argv[0]}, which starts the ranks")
        return original(cls, *args, **kwargs)

    def before_trainer(self, init: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse it: this process is none of the ranks, and its model is not partitioned.

        Raises:
            BalanceError: always.
        """
        raise zero_support.refusal("launcher_trains", program=os.path.basename(sys.argv[0]))
