"""Ranks wait for each other, for a limited time, before they do together what one alone would wait for in vain."""

import time

from .. import log, zero_support
from ..errors import BalanceError, ZeroError
from ..units import counted
from . import process_group

FIRST_LINE = 30.0  # seconds until a rank that waits tells for whom
LONGEST_PAUSE = 0.2  # seconds between two looks
_meetings: dict[str, int] = {}  # how often this rank has come, by what for


def meet(what: str, remedy: str = "Let every rank do it, not only the first") -> None:
    """Go on once all ranks have come here for `what`.

    A rank that waits for long writes one line. It waits as long as the process group would, but not for a rank whose
    program has ended.

    Raises:
        ZeroError: some rank has not come in time, or cannot come any more.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    number = _meetings[what] = _meetings.get(what, 0) + 1
    store, rank, key = process_group.store(), dist.get_rank(), f"balance_shim/{what}/{number}"
    others = [each for each in range(dist.get_world_size()) if each != rank]
    began, pause, has_told = time.monotonic(), 0.001, False
    limit = process_group.timeout() * 0.9  # before the others, who wait elsewhere, end with a bare time-out
    try:
        store.set(f"{key}/{rank}", "1")
        while not store.check([f"{key}/{each}" for each in others]):
            waited = time.monotonic() - began
            missing = [each for each in others if not store.check([f"{key}/{each}"])]
            gone = [each for each in missing if store.check([f"balance_shim/left/{each}"])]
            if gone:
                raise _refusal(what, rank, f"{_ranks(gone)} ended without it", remedy)
            if waited > limit:
                late = f"{_ranks(missing)} did not come within {waited:.0f} s"
                raise _refusal(what, rank, late, remedy)
            if waited > FIRST_LINE and not has_told and missing:
                has_told = True
                log.error_of_any_rank(
                    f"waits in {what} for {_ranks(missing)}, for {limit:.0f} s at most: under ZeRO-3 each rank holds a "
                    f"part of the weights. {remedy}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if number > 2:  # which all have left
            store.delete_key(f"balance_shim/{what}/{number - 2}/{rank}")
    except RuntimeError as error:
        if isinstance(error, BalanceError):
            raise
        # The store is gone, and with it the rank that had it.
        raise _refusal(what, rank, "another rank ended without it", remedy) from None


def leave() -> None:
    """Tell the other ranks that the program of this one has ended."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        process_group.store().set(f"balance_shim/left/{dist.get_rank()}", "1")


def _refusal(what: str, rank: int, why: str, remedy: str) -> ZeroError:
    return zero_support.refusal("one_rank_alone", what=what, rank=rank, why=why, remedy=remedy)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{counted(len(ranks), 'rank')} ({', '.join(map(str, ranks))})"
