"""A Trainer's `training_step` without its backward pass, which runs later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Backward(NamedTuple):
    """A backward pass that was asked for: the arguments of `Accelerator.backward`."""

    loss: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def postponed_backward(accelerator: Any) -> Iterator[list[Backward]]:
    """Give the list that `accelerator.backward` fills within the context, where it runs nothing."""
    own = vars(accelerator).get("backward")
    passes: list[Backward] = []

    def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        passes.append(Backward(loss, args, kwargs))

    accelerator.backward = backward
    try:
        yield passes
    finally:
        if own is None:
            del accelerator.backward
        else:
            accelerator.backward = own


class HostCount(torch.Tensor):
    """The number of label tokens of a step, on the host, which goes to a device without waiting for it.

    `count.to(device)` of transformers' losses waits for all that the device has to do, since host memory is pageable.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what `torch.Tensor.to` does."""
        return self.as_subclass(torch.Tensor).to(*args, **{**kwargs, "non_blocking": True})


def not_waiting(count: Any) -> Any:
    """Return `count` as a `HostCount` if it is a single value on the host; itself otherwise."""
    plain = type(count) is torch.Tensor and count.dim() == 0 and count.device.type == "cpu"
    return count.as_subclass(HostCount) if plain else count
