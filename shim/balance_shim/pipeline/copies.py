"""Copies of tensors between devices, on streams of their own.

A plain `tensor.to(device)` makes the current streams of both devices wait for each other (torch 2.13,
ATen/native/cuda/Copy.cu), so the source waits for all that the destination has queued. Here the two current streams are
copy streams while the copy is issued; events order them with the streams that compute. The scheme is that of
torchgpipe's `Copy` and `Wait`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..virtual.tensor import VirtualTensor

plain_to: Any = torch._C.TensorBase.to  # whatever stands around it
# (device, the other device, whether it sends) -> its copy stream. Forward and backward copies have different pairs.
_streams: dict[tuple[torch.device, torch.device | int, bool], Any] = {}
_computes: dict[Any, Any] = {}  # the stream that a backward pass begins on -> the one that computes there


def cross(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on `device`, which is another one than its own; gradients come back the same way."""
    if not is_plain(tensor) or tensor.device.type != device.type:
        return tensor.to(device)
    if tensor.requires_grad and torch.is_grad_enabled():
        copied: torch.Tensor = _Copy.apply(tensor, device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return copied
    return _copied(tensor, device)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is one of torch's own, or a simulated one, and not a class with an idea of its own of `to`."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, VirtualTensor)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.source = tensor.device
        # Backward runs in a thread of the engine, where the current stream of another device is the default one.
        ctx.computes, ctx.reads = _current_stream(tensor.device), _current_stream(device)
        return _copied(tensor, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        gradient = _copied(gradients[0], ctx.source, ctx.computes, ctx.reads)
        if ctx.reads in _computes and isinstance(gradients[0], VirtualTensor):
            torch.get_device_module(ctx.reads.device).set_stream(_computes[ctx.reads])
        return gradient, None


def _copied(tensor: torch.Tensor, device: torch.device, reader: Any = None, writer: Any = None) -> torch.Tensor:
    """Return a copy of `tensor` on `device`, for which only `reader` waits, by default the current stream there.

    It waits for `writer`, by default the current stream where `tensor` is. Without streams it is a plain copy.
    """
    module: Any = streaming_module(device)
    if module is None:
        moved: torch.Tensor = plain_to(tensor, device)
        return moved
    reader = reader if reader is not None else module.current_stream(device)
    sends, receives = _stream(module, tensor.device, device, True), _stream(module, device, tensor.device, False)
    sends.wait_stream(writer if writer is not None else module.current_stream(tensor.device))
    with module.stream(sends), module.stream(receives):
        copy: torch.Tensor = plain_to(tensor, device, non_blocking=True)
    reader.wait_stream(receives)
    if not isinstance(tensor, VirtualTensor):  # the memory of simulated devices has no streams
        tensor.record_stream(sends)
        copy.record_stream(reader)
    return copy


def _current_stream(device: torch.device) -> Any:
    module: Any = streaming_module(device)
    return None if module is None else module.current_stream(device)


def streaming_module(device: torch.device) -> Any:
    """Return torch's module of `device` if that has streams; None otherwise."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    return module if all(hasattr(module, name) for name in ("Stream", "stream", "current_stream")) else None


def stream_apart(module: Any, device: torch.device, number: int) -> Any:
    """Return the stream of `device` on which the results of the pass with that number arrive."""
    return _stream(module, device, number, False)


@contextmanager
def computing_behind(apart: Any, computes: Any) -> Iterator[None]:
    """While simulated devices run a backward pass that begins on stream `apart`: go on with `computes`.

    The threads of a real device run each operation on the stream of its forward pass. Simulated devices run all of them
    on the current stream.
    """
    _computes[apart] = computes
    try:
        yield
    finally:
        del _computes[apart]


def _stream(module: Any, device: torch.device, other: torch.device | int, sends: bool) -> Any:
    key = device, other, sends
    if key not in _streams:
        _streams[key] = module.Stream(device=device)
    return _streams[key]
