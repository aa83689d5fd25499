"""Lean transfers: tensors that accelerate's hooks move between devices, moved once and without blocking.

A hook keeps its place, its device and its attributes; for the length of a training step it only moves inputs in another
way. Outside of steps, and where it manages offloaded weights, it does what accelerate made it for. Models and trainers
also move tensors themselves (labels to the device of the logits) with `tensor.to`, which blocks no more in a step.
"""

import copyreg
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import find_device, honor_type, send_to_device

from .. import devices
from ..logits.deferred import DeferredLogits
from ..placement.align_hooks import hooks_of
from .copies import computing_behind, cross, is_plain, plain_to, stream_apart, streaming_module
from .shared_copies import SharedCopies

if TYPE_CHECKING:
    from torch import nn

# Of the step under way. Not a thread's own: a recomputation runs in the threads of autograd's engine.
_active: list[SharedCopies] = []
# Of the forward pass under way, where several are in flight.
_results: list["Results"] = []
_PLAIN_VALUES = (type(None), bool, int, float, str)


class LeanHook(AlignDevicesHook):  # type: ignore[misc]  # accelerate has no types
    """accelerate's hook with lean transfers within `transferring`. Copies and pickles are of accelerate's class."""

    def pre_forward(self, module: "nn.Module", *args: Any, **kwargs: Any) -> Any:
        """Return args and kwargs on the device of the module."""
        if not _active:
            return super().pre_forward(module, *args, **kwargs)
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        device, copies = _device(self.execution_device), _active[-1]
        skipped = _skipped(self.skip_keys)
        sent = tuple([_sent(argument, device, copies, skipped) for argument in args])
        return sent, {
            name: argument if name in skipped else _sent(argument, device, copies, skipped)
            for name, argument in kwargs.items()
        }

    def post_forward(self, module: "nn.Module", output: Any) -> Any:
        """Return the output, on the device of the inputs where the hook is the model's own."""
        if not _active:
            return super().post_forward(module, output)
        if self.io_same_device and self.input_device is not None:
            device = _device(self.input_device)
            if _results:
                _results[-1].go_on_apart(device)
            return _sent(output, device, None, _skipped(self.skip_keys))
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (AlignDevicesHook,), vars(self).copy()  # type: ignore[attr-defined]


class Results:
    """The streams on which the outputs of one forward pass in flight arrive, and on which its backward pass begins.

    The streams that compute would wait for them, and with these the next pass for the end of this one.
    """

    def __init__(self, number: int) -> None:
        """Take the streams of the pass with this number among those in flight."""
        self._number = number
        self._streams: dict[torch.device, tuple[Any, Any]] = {}  # device -> (that stream, the one that computes)
        self._entered = ExitStack()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within the forward pass, and what is computed from its outputs."""
        _results.append(self)
        try:
            with self._entered:
                yield
        finally:
            _results.remove(self)

    def go_on_apart(self, device: torch.device) -> None:
        """From here on, in the forward pass, let operations on `device` be queued on a stream of their own."""
        module = streaming_module(device)
        if module is None or device in self._streams:
            return
        computes = module.current_stream(device)
        apart = stream_apart(module, device, self._number)
        self._streams[device] = apart, computes
        apart.wait_stream(computes)
        self._entered.enter_context(module.stream(apart))

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Where the backward pass is started: what it begins with is queued on the streams of the results."""
        with ExitStack() as streams:
            for device, (apart, computes) in self._streams.items():
                streams.enter_context(streaming_module(device).stream(apart))
                streams.enter_context(computing_behind(apart, computes))
            yield

    def arrive(self) -> None:
        """Have the streams that compute wait for what has been queued on those of the results."""
        for apart, computes in self._streams.values():
            computes.wait_stream(apart)


@contextmanager
def transferring(copies: SharedCopies) -> Iterator[None]:
    """Have hooks that `make_lean` has changed transfer through `copies`."""
    own = vars(torch.Tensor).get("to")
    lean = _crossing(own or plain_to)
    _active.append(copies)
    torch.Tensor.to = lean  # type: ignore[method-assign]
    # torch tells classes of tensors by the function that stands there what is asked of them.
    handlers = DeferredLogits.handlers
    if (own or plain_to) in handlers:
        handlers[lean] = handlers[own or plain_to]
    try:
        yield
    finally:
        handlers.pop(lean, None)
        if own is None:
            del torch.Tensor.to
        else:
            torch.Tensor.to = own  # type: ignore[method-assign]
        _active.remove(copies)
        copies.clear()


def _crossing(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `torch.Tensor.to` with which a tensor that only changes to another accelerator does not block.

    Each call makes a copy of its own, as the caller may write into it.
    """

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and isinstance(args[0], (torch.device, str, int)) and not kwargs.keys() - {"non_blocking"}:
            place = _device(args[0])
            current = self.device
            if place != current and place.type == current.type and place.index is not None and is_plain(self):
                return cross(self, place)
        return original(self, *args, **kwargs)

    return to


def make_lean(model: "nn.Module") -> int:
    """Change the hooks of `model` that only move inputs; return how many there are."""
    count = 0
    for module in model.modules():
        for hook in hooks_of(module):
            if type(hook) is AlignDevicesHook and not hook.offload and _is_accelerator(hook.execution_device):
                hook.__class__ = LeanHook
            count += isinstance(hook, LeanHook)
    return count


def restore(model: "nn.Module") -> None:
    """Give the hooks of `model` accelerate's class again."""
    for module in model.modules():
        for hook in hooks_of(module):
            if isinstance(hook, LeanHook):
                hook.__class__ = AlignDevicesHook


def _sent(value: Any, device: torch.device, copies: SharedCopies | None, skipped: Collection[str]) -> Any:
    """Return the result of accelerate's `send_to_device` (1.0 to 1.15), with new containers as there."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        return cross(value, device) if copies is None else copies.on(value, device)
    if isinstance(value, _PLAIN_VALUES):
        return value
    if hasattr(value, "to"):
        return send_to_device(value, device)
    if isinstance(value, (tuple, list)):
        return honor_type(value, (_sent(item, device, copies, skipped) for item in value))
    if isinstance(value, Mapping):
        mapping_type: Any = type(value)
        return mapping_type(
            {name: item if name in skipped else _sent(item, device, copies, skipped) for name, item in value.items()}
        )
    return value


@functools.cache
def _device(place: Any) -> torch.device:
    if isinstance(place, int):
        return torch.device(devices.accelerator_type() or "cpu", place)
    return place if isinstance(place, torch.device) else torch.device(place)


def _is_accelerator(place: Any) -> bool:
    return isinstance(place, int) or (place is not None and _device(place).type not in ("cpu", "meta"))


def _skipped(keys: Any) -> Collection[str]:
    return () if keys is None else (keys,) if isinstance(keys, str) else keys
