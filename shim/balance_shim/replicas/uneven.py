"""Replicas whose maps differ, because their shares of the devices do.

`DistributedDataParallel` puts parameters of one device into one bucket, and ranks add up bucket by bucket: with another
map there are other buckets, and ranks wait for each other for ever. One bucket for each parameter is the same on all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ONE_BYTE = 1 / 2**20  # in MiB: no bucket takes a second parameter


def are_uneven(model: Any) -> bool:
    """Return whether the replicas of `model` are split differently; all ranks have to call this."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return False
    structures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(structures, _structure(model))
    return len(set(structures)) > 1


@contextmanager
def one_bucket_each() -> Iterator[None]:
    """Have each `DistributedDataParallel` that is made keep a bucket for each parameter.

    What it broadcasts in batches by device, weights at its start and buffers ahead of each pass, is sent one by one at
    the start.
    """
    import torch
    import torch.distributed as dist

    kind = torch.nn.parallel.DistributedDataParallel

    def make(module: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs |= {"bucket_cap_mb": ONE_BYTE, "broadcast_buffers": False, "init_sync": False}
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)
        return kind(module, *args, **kwargs)

    def assignment(tensors: Any, *_: Any) -> tuple[list[list[int]], list[int]]:
        return [[index] for index in range(len(tensors))], [1] * len(tensors)

    plan = dist._compute_bucket_assignment_by_size
    vars(torch.nn.parallel)["DistributedDataParallel"], vars(dist)[plan.__name__] = make, assignment
    try:
        yield
    finally:
        vars(torch.nn.parallel)["DistributedDataParallel"], vars(dist)[plan.__name__] = kind, plan


def _structure(model: Any) -> tuple[int, ...]:
    """Return for each parameter the number of its device, in the order in which the devices are met."""
    met: dict[Any, int] = {}
    return tuple(met.setdefault(parameter.device, len(met)) for parameter in model.parameters())
