"""Plans of replicas: each of several ranks trains the model on its share of a request's devices."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..replicas.shares import Share
from . import planner
from .request import Request


def most_that_fit(request: Request, shares_of: Callable[[int], Sequence[Share]]) -> int:
    """Return the most replicas of which each fits its share, with the reserve kept free; 1 where no second one does.

    Args:
        request: with all devices.
        shares_of: number of ranks -> their shares.
    """
    for count in range(len(request.devices), 1, -1):
        requests = of_shares(request, shares_of(count))
        if requests and all(planner.fitting(share_request) is not None for share_request in requests):
            return count
    return 1


def of_shares(request: Request, shares: Sequence[Share]) -> list[Request]:
    """Return a request for each kind of share, the one with the least memory first.

    Empty where `request` lacks a device of a share: no room is left on it.
    """
    by_index = {device.index: device for device in request.devices}
    if any(index not in by_index for share in shares for index in share):
        return []
    replicated = request.with_workload(replicated=True)
    kinds = {tuple(by_index[index].capacity for index in share): share for share in reversed(shares)}
    weakest_first = sorted(kinds, key=sum)
    return [
        replace(replicated, devices=tuple(by_index[index] for index in kinds[capacities]))
        for capacities in weakest_first
    ]
