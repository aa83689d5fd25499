"""Values that the ranks of a training agree on, over their process group."""

from typing import Any


def is_wrapped(model: Any) -> bool:
    """Return whether `model` is one of several replicas, whose parameters have their places in DDP's buckets."""
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(model, DistributedDataParallel)


def meet() -> None:
    """Wait until all ranks are here."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def least(number: int, device: Any) -> int:
    """Return the smallest `number` of all ranks; all of them have to call this.

    Args:
        device: this rank's own, as NCCL takes nothing from the host.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    held = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return int(held.item())
