"""`BALANCE_REPLICAS`: this process becomes the ranks that train, each on its share of the devices."""

import os
import sys
from typing import NoReturn

from .. import devices, log, state
from ..errors import ReplicaError
from ..placement.model_load import ModelLoad
from ..placement.replica_plans import most_that_fit
from ..processes import is_worker
from ..replicas import ranks
from ..units import counted
from ..zero import ranks as ranks_of_zero
from ..zero.launching import relaunch
from . import placing

NAME = "BALANCE_REPLICAS"


def ensure_launched() -> None:
    """Become as many ranks as asked for, unless a launcher has started some, or the model decides how many.

    Raises:
        ReplicaError: they cannot be started.
    """
    if ranks_of_zero.LAUNCHER_PROCESS in os.environ:
        ranks_of_zero.die_with_launcher()
    requested = state.settings().replicas
    if isinstance(requested, str) or requested == 1 or not may_launch():  # "auto" is decided once there is a model
        return
    available = len(devices.totals(state.settings()))
    if requested > available:
        raise ReplicaError(
            f"{NAME}={requested}: there {'is' if available == 1 else 'are'} {counted(available, 'device')} to use, and "
            "each replica needs one at least"
        )
    try:
        _become(requested)
    except relaunch.Unrepeatable as error:
        raise ReplicaError(f"{NAME}={requested}: {error}") from None


def may_launch() -> bool:
    """Return whether this process may become several; logs that a launcher has started another number than asked."""
    requested = state.settings().replicas
    if relaunch.is_launched(os.environ):
        rank = ranks.local_rank(os.environ)
        started = 1 if rank is None else rank.count
        if requested not in ("auto", started) and os.environ.get("LOCAL_RANK", "0") == "0":
            log.once("warning", f"{NAME}={requested} is ignored: a launcher has started {started} on this machine")
        return False
    return not is_worker() and not relaunch.has_own_launcher(sys.orig_argv)


def launch_largest(load: ModelLoad) -> None:
    """With `BALANCE_REPLICAS=auto`, become as many ranks as have room for the model; return if that is one."""
    if state.settings().replicas != "auto" or not may_launch():
        return
    count = _largest(load)
    if count == 1:
        return
    try:
        _become(count)
    except relaunch.Unrepeatable as error:
        log.info(f"{counted(count, 'replica')} would fit, but {error}")


def _largest(load: ModelLoad) -> int:
    """Return the most replicas that fit, each with a balanced map on its share."""
    request = placing.request_for(load, placing.usable_devices(load))
    return most_that_fit(request, ranks.all_shares)


def _become(count: int) -> NoReturn:
    relaunch.become(count, "replicas of the model")
