"""Ranks wait for each other, for a limited time, before a joint operation in which one alone would hang."""

import time

from .. import log, zero_support
from ..errors import BalanceError, ZeroError
from ..units import counted
from . import process_group

FIRST_LINE = 30.0  # seconds until a rank that waits tells for whom
LONGEST_PAUSE = 0.2  # seconds between two looks
_meetings: dict[str, int] = {}  # operation -> how often this rank has come for it


def meet(operation: str, remedy: str = "Let every rank do it, not only the first") -> None:
    """Go on once all ranks have come here for `operation`.

    A rank that waits for long writes one line. It waits as long as the process group would, but not for a rank whose
    program has ended.

    Raises:
        ZeroError: some rank has not come in time, or cannot come any more.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    number = _meetings[operation] = _meetings.get(operation, 0) + 1
    store, rank, key = process_group.store(), dist.get_rank(), f"balance_shim/{operation}/{number}"
    other_ranks = [other_rank for other_rank in range(dist.get_world_size()) if other_rank != rank]
    began, pause, has_told = time.monotonic(), 0.001, False
    limit = process_group.timeout() * 0.9  # before the others, who wait elsewhere, end with a bare time-out
    try:
        store.set(f"{key}/{rank}", "1")
        while not store.check([f"{key}/{other_rank}" for other_rank in other_ranks]):
            waited = time.monotonic() - began
            missing = [other_rank for other_rank in other_ranks if not store.check([f"{key}/{other_rank}"])]
            gone = [other_rank for other_rank in missing if store.check([f"balance_shim/left/{other_rank}"])]
            if gone:
                raise _refusal(operation, rank, f"{_ranks(gone)} ended without it", remedy)
            if waited > limit:
                late = f"{_ranks(missing)} did not come within {waited:.0f} s"
                raise _refusal(operation, rank, late, remedy)
            if waited > FIRST_LINE and not has_told and missing:
                has_told = True
                log.error_of_any_rank(
                    f"waits in {operation} for {_ranks(missing)}, for {limit:.0f} s at most: under ZeRO-3 each rank "
                    f"holds a part of the weights. {remedy}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if number > 2:  # which all have left
            store.delete_key(f"balance_shim/{operation}/{number - 2}/{rank}")
    except RuntimeError as error:
        if isinstance(error, BalanceError):
            raise
        # The store is gone, and with it the rank that had it.
        raise _refusal(operation, rank, "another rank ended without it", remedy) from None


def leave() -> None:
    """Tell the other ranks that the program of this one has ended."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        process_group.store().set(f"balance_shim/left/{dist.get_rank()}", "1")


def _refusal(operation: str, rank: int, why: str, remedy: str) -> ZeroError:
    return zero_support.refusal("one_rank_alone", what=operation, rank=rank, why=why, remedy=remedy)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{counted(len(ranks), 'rank')} ({', '.join(map(str, ranks))})"
