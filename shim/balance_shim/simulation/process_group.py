"""Collective operations on simulated devices: gloo's, on the numbers that the tensors hold.

Each rank simulates the whole machine and counts what it has on it. Ranks are on devices of their own, so no two of them
count on one device, as long as each keeps to its share.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from .tensor import BACKEND, SimulatedTensor

# What accelerate asks for on "npu" devices.
NAME = "hccl"
_COLLECTIVES = (
    "allgather", "_allgather_base", "allgather_coalesced", "allreduce", "allreduce_coalesced", "alltoall",
    "alltoall_base", "broadcast", "gather", "recv", "reduce", "reduce_scatter", "_reduce_scatter_base", "scatter",
    "send",
)  # fmt: skip
# The names that torch 2.13 calls, and what gloo has under another one.
_RENAMED = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}


def register() -> None:
    """Let process groups of simulated devices be made; nothing where torch has no distributed package."""
    if not dist.is_available() or NAME in dist.Backend.backend_list:
        return

    def make(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
        return SimulatedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)

    dist.Backend.register_backend(NAME, make, devices=[BACKEND])


def translated_backend(backend: Any) -> Any:
    """Return the backend of simulated devices where a program names CUDA's: "cpu:gloo,cuda:nccl"."""
    if not isinstance(backend, str):
        return backend
    return backend.replace("cuda:", f"{BACKEND}:").replace("nccl", NAME)


class SimulatedGroup(dist.ProcessGroup):
    """A process group around one of gloo."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.gloo, self._rank, self._size = gloo, rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return NAME

    def barrier(self, *_: Any, **__: Any) -> Any:
        return self.gloo.barrier()

    def __repr__(self) -> str:
        return f"SimulatedGroup(rank={self._rank}, size={self._size})"


def _collective(name: str) -> Callable[..., Any]:
    def collective(self: SimulatedGroup, *args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []

        def bare(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            tensors.append(value.raw if isinstance(value, SimulatedTensor) else value)
            return tensors[-1]

        bare_args, bare_kwargs = tree_map(bare, (args, kwargs))
        if any(tensor.is_meta for tensor in tensors):  # there is nothing to send
            return _done(tensors)
        return getattr(self.gloo, name)(*bare_args, **bare_kwargs)

    collective.__name__ = name
    return collective


for _name, _of_gloo in (*zip(_COLLECTIVES, _COLLECTIVES, strict=True), *_RENAMED.items()):
    setattr(SimulatedGroup, _name, _collective(_of_gloo))


def _done(result: list[torch.Tensor]) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    make: Any = vars(torch._C._distributed_c10d)["_create_work_from_future"]
    return make(future)
