"""The ZeRO-3 session, set up before a model loads: ranks, process group, and a config that stays alive."""

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

from .. import devices, log, state
from ..patching.guard import attempt
from . import config, process_group, ranks
from .launching import relaunch, requirements

# transformers keeps only a weak reference to the config that counts, in every version.
_alive: list[Any] = []
_ready = False
_dtype: Any = None


def begin(ddp_timeout: float | None = None) -> None:
    """Make this process one of several that train with ZeRO-3, with its process group up. May not return: see exec.

    Args:
        ddp_timeout: seconds that ranks wait for each other, as `TrainingArguments` have it; None before there are any.

    Raises:
        BalanceError: that cannot be done.
    """
    global _ready
    relaunch.ensure_launched()
    seconds = float(state.settings().nccl_timeout or ddp_timeout or process_group.DEFAULT_TIMEOUT)
    timeout = timedelta(seconds=seconds)
    if _ready:
        if ddp_timeout is not None:  # the model came first, when they were not known
            process_group.remember_timeout(seconds)
            _use_timeout(timeout)
        return
    process_group.remember_timeout(seconds)
    requirements.check()
    ranks.complete_environment(os.environ)
    ranks.use_visible_device(os.environ, devices.count())
    ranks.die_with_launcher()
    if devices.accelerator_type() is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["ACCELERATE_USE_CPU"] = "false"  # `accelerate launch` says true, and leaves DeepSpeed out then
    _start_group(timeout)
    from torch.autograd import function
    from torch.nn.modules import module
    from torch.nn.utils import parametrize as parametrizations

    from . import autograd_function, parametrize
    from .weights import deep_copies

    autograd_function.apply(function)
    parametrize.apply(parametrizations)
    deep_copies.apply(module)
    _ready = True


def divide_from_now_on(dtype: Any) -> None:
    """Have transformers partition each model when it is made, before any `TrainingArguments` ask for it.

    Args:
        dtype: the torch dtype of the weights to come.
    """
    from transformers.integrations import deepspeed

    if not _is_ours_or_dead(deepspeed):
        return
    _alive.append(deepspeed.HfDeepSpeedConfig(config.for_loading(dtype)))


def keep_alive(hf_config: Any) -> None:
    """Keep the config of `TrainingArguments` alive, however long those are: models may load after they are gone."""
    _alive.append(hf_config)


def live_config() -> Any:
    """Return the config object that counts now, or None."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    return None if reference is None else reference()


def remember_dtype(dtype: Any) -> None:
    """Keep the torch dtype of the weights that load now."""
    global _dtype
    _dtype = dtype


def loaded_dtype() -> Any:
    """Return the torch dtype of the weights that were loaded last; None before any."""
    return _dtype


def _is_ours_or_dead(deepspeed: Any) -> bool:
    live = live_config()
    return live is None or not isinstance(live, deepspeed.HfTrainerDeepSpeedConfig)


def _start_group(timeout: timedelta) -> None:
    import torch.distributed as dist

    quiet = logging.WARNING if state.settings().log_level != "debug" else logging.INFO
    os.environ.setdefault("DS_LOG_LEVEL", "debug" if quiet == logging.INFO else "warning")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(quiet)  # it writes to standard output
    # torch 2.13 says so at each of DeepSpeed's collective operations, thousands of times in a short training.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    kind = devices.accelerator_type()
    _set_default_timeouts(timeout)
    if kind is not None:
        import torch

        torch.get_device_module(kind).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "gloo" if kind is None else deepspeed.get_accelerator().communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    log.debug(f"process group of {dist.get_world_size()} ranks, {dist.get_backend()}")
    ranks.leave_group_at_exit()


def _use_timeout(timeout: timedelta) -> None:
    """Have the process groups that there are, and those to come, use `timeout`."""
    from torch.distributed import distributed_c10d

    _set_default_timeouts(timeout)
    change = getattr(distributed_c10d, "_set_pg_timeout", None)  # torch 2.5 has it; private, so it may go
    if change is None:
        return
    for group in list(distributed_c10d._world.pg_map):
        attempt("setting the time-out of a process group", change, timeout, group, instead="it keeps the one it has")


def _set_default_timeouts(timeout: timedelta) -> None:
    """Have every process group of this process that names no time-out of its own use `timeout`.

    DeepSpeed makes further groups, and torch looks up these two names for each.
    """
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if hasattr(distributed_c10d, name):
            setattr(distributed_c10d, name, timeout)
