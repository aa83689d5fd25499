"""Ranks wait for each other, for a limited time, before they do together what one alone would wait for in vain."""

from datetime import timedelta

from . import support

PATIENCE = 120  # seconds
_meetings: dict[str, int] = {}  # how often this rank has come, by what for


def meet(what: str, remedy: str = "Let every rank do it, not only the first") -> None:
    """Go on once all ranks have come here for `what`.

    Raises:
        BalanceError: some rank has not come in time.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    number = _meetings[what] = _meetings.get(what, 0) + 1
    store, size, rank = distributed_c10d._get_default_store(), dist.get_world_size(), dist.get_rank()
    store.set(f"balance_shim/{what}/{number}/{rank}", "1")
    try:
        store.wait([f"balance_shim/{what}/{number}/{each}" for each in range(size)], timedelta(seconds=PATIENCE))
    except RuntimeError:
        raise support.refusal(
            "one_rank_alone", what=what, rank=rank, size=size, seconds=PATIENCE, remedy=remedy
        ) from None
