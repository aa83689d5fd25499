"""Models that cannot be loaded in partitions: they are loaded whole into host memory, and partitioned then.

Under ZeRO-3 transformers constructs a model of empty weights and fills one after another. Some models do not survive
that: their initialization reads a weight's shape (Whisper) or values (weight norm in Wav2Vec2), and transformers'
loader for ZeRO-3 ignores `ignore_mismatched_sizes=True`. There the load is repeated without ZeRO-3, one rank of a
machine after another, and the first rank's weights are partitioned one by one. A machine holds two whole models at
most: the first rank's, and that of the rank that loads.
"""

import contextlib
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ... import log, zero_support
from ...errors import BalanceError
from ...rng import host_states, restore
from .. import process_group

if TYPE_CHECKING:
    from torch import nn

# Not the fault of ZeRO-3: a repeated load would fail the same way.
_SAME_EVERYWHERE = (OSError, ImportError, BalanceError)
LONGEST_WAIT = timedelta(days=1)  # for a turn; a rank that fails meanwhile ends the others

# Under ZeRO-3 transformers 5 raises at the first such weight. 4.51 compares sizes with those of empty weights, finds
# that none agrees, and leaves all of them at random values, without an error.
IGNORES_SIZES = "ignore_mismatched_sizes=True"

_loads = 0  # so far; ranks count alike


def load(original: Callable[..., Any], cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of `from_pretrained`, its parameters partitioned. All ranks do this together.

    Raises:
        Exception: any error that the load without ZeRO-3 raises, too.
    """
    global _loads
    _loads += 1
    random_states = host_states()
    reason: str | None = IGNORES_SIZES if kwargs.get("ignore_mismatched_sizes") else None
    if reason is None:
        try:
            loaded = original(cls, *args, **kwargs)
        except _SAME_EVERYWHERE as error:
            _tell(_loads, "fails", error)
            raise
        except Exception as error:
            reason = _tell(_loads, "cannot", error)
        else:
            reason = _tell(_loads, "loaded")
    if reason is None:
        return loaded
    loaded = None
    gc.collect()  # the model that was begun
    restore(random_states)
    log.info(zero_support.sentence("loaded_whole", cls=cls.__name__, reason=reason))
    with _one_at_a_time(_loads), _without_zero3():
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        if _several() and os.environ["RANK"] != "0":
            _drop_values(model)
            gc.collect()
    partition(model)
    return loaded


def partition(model: "nn.Module") -> None:
    """Partition the parameters of `model`, which the first rank holds; the others need their shapes only.

    They get the dtype that they would have been constructed in.
    """
    import torch
    from deepspeed import zero
    from transformers.integrations import deepspeed

    config = deepspeed.deepspeed_config()
    dtype = zero.Init(config_dict_or_path=config).dtype
    sends = not _several() or torch.distributed.get_rank() == 0
    first: Any = None
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            continue
        if not sends:  # room for what the first rank sends
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        if first is None:
            first = parameter
            holder = torch.nn.Module()
            holder.register_parameter("weight", parameter)
            zero.Init(module=holder, config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])


def _tell(number: int, outcome: str, error: BaseException | None = None) -> str | None:
    """Tell the other ranks how the load has ended here, and return why one of them cannot load; None if all can.

    A rank that fails for a reason of its own does not wait.
    """
    reason = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if not _several():
        return reason if outcome == "cannot" else None
    import torch.distributed as dist

    store, key = process_group.store(), f"balance_shim/load/{number}"
    store.set(f"{key}/{dist.get_rank()}", json.dumps([outcome, reason]))
    if outcome == "fails":
        return None
    keys = [f"{key}/{rank}" for rank in range(dist.get_world_size())]
    store.wait(keys, timedelta(seconds=process_group.timeout()))
    outcomes = [json.loads(store.get(rank_key)) for rank_key in keys]
    return next((cause for ended, cause in outcomes if ended == "cannot"), None)


@contextlib.contextmanager
def _one_at_a_time(number: int) -> Iterator[None]:
    """Have the ranks of a machine come here one after another."""
    if not _several():
        yield
        return
    store, key = process_group.store(), f"balance_shim/turn/{number}/{socket.gethostname()}"
    turn = store.add(f"{key}/tickets", 1)
    if turn > 1:
        store.wait([f"{key}/done/{turn - 1}"], LONGEST_WAIT)
    try:
        yield
    finally:
        store.set(f"{key}/done/{turn}", "1")


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """Have transformers load as if there were no DeepSpeed config."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def _drop_values(model: "nn.Module") -> None:
    """Have the parameters of `model` keep their shapes, and no memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(1).expand(parameter.shape)


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1
