"""A process that starts the ranks itself, such as `trl sft` or `swift sft`: nothing trains in it."""

import os
import sys
from typing import Any

from .. import log, state, zero_support
from ..units import counted
from ..zero.launching import relaunch, requirements
from .base import Mode, Original


class Launcher(Mode):
    """Tells programs with launchers of their own how many ranks to start."""

    purpose: str  # what the ranks are for
    asked_by: str  # the setting that has no effect in this process

    def before_launcher(self, program: str) -> None:
        """Set the variables that the launcher reads, unless the user has set them.

        LLaMA-Factory (0.9.5) starts ranks for several devices only, and trains in its own process otherwise. It is told
        to start them on one device and on the CPU too: one, if the user asks for one.

        Raises:
            BalanceError: ranks are asked for and cannot be had.
        """
        is_set = any(os.environ.get(name, "").strip() for name in ("NPROC_PER_NODE", "NNODES"))
        count = None if is_set else self.process_count()
        if program == "llamafactory" and (is_set or count is not None):
            os.environ["FORCE_TORCHRUN"] = "1"
        if count is None:
            return
        os.environ["NPROC_PER_NODE"] = str(count)
        os.environ.update(relaunch.threads_for(count))
        log.info(f"{program} starts {counted(count, 'process')} for {self.purpose}")

    def process_count(self) -> int | None:
        """Return how many ranks to start; None leaves it to the launcher."""
        raise NotImplementedError

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand around `cls.from_pretrained`."""
        log.once(
            "warning", f"{self.asked_by} has no effect in {sys.argv[0]}, which starts the ranks and is none of them"
        )
        return original(cls, *args, **kwargs)


class ZeroLauncher(Launcher):
    """Starts the ranks of mode `zero3`."""

    purpose, asked_by = "ZeRO-3", "BALANCE_MODE=zero3"

    def process_count(self) -> int:
        """Return BALANCE_NPROC, or one for each device."""
        requirements.check()
        return relaunch.process_count()

    def before_trainer(self, init: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse it: this process is none of the ranks, and its model is not partitioned.

        Raises:
            BalanceError: always.
        """
        raise zero_support.refusal("launcher_trains", program=os.path.basename(sys.argv[0]))


class ReplicaLauncher(Launcher):
    """Starts the ranks that train replicas."""

    purpose, asked_by = "replicas", "BALANCE_REPLICAS"

    def process_count(self) -> int | None:
        """Return BALANCE_REPLICAS; with `auto` the process that loads the model decides, and becomes as many."""
        setting = state.settings().replicas
        return setting if isinstance(setting, int) else None
