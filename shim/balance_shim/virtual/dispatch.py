"""Dispatch of one operation on virtual devices: unwrap, check the devices, compute, count, wrap.

This is below autograd and autocast, so torch's own rules for both apply; what arrives here are single kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import kernels, shapes
from .machine import Machine
from .tensor import VirtualTensor, follow, wrap

aten = torch.ops.aten

# Operations that copy from one device to another; all others need their tensors on one.
_CROSSING = {
    aten.copy_.default, aten._to_copy.default, aten._copy_from.default, aten._copy_from_and_resize.default,
    aten.set_.source_Tensor,
}  # fmt: skip

# CUDA takes the tensors of indices from the host as well.
_HOST_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

# Named with their underscore these change the shape of the tensor that they are called on.
_RESHAPING = {
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
}  # fmt: skip


def mismatch(operation: str, first: torch.Tensor, second: torch.Tensor) -> RuntimeError:
    """Return the error of an operation that meets tensors of two devices: type and words are CUDA's.

    Its attribute `tensors` holds the two.
    """
    error = RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{first.device} and {second.device}! (when running {operation})"
    )
    error.tensors = first, second  # type: ignore[attr-defined]
    return error


class _Rule:
    """The facts about an operation that dispatch needs, computed when it is first met."""

    __slots__ = (
        "composite",
        "crossing",
        "host_indices",
        "mutates",
        "per_tensor",
        "random",
        "reshapes",
        "takes_generator",
    )

    def __init__(self, func: torch._ops.OpOverload):
        name = func._schema.name.removeprefix("aten::")
        self.mutates = func._schema.is_mutable
        self.reshapes = self.mutates and (name in _RESHAPING or any(arg.is_out for arg in func._schema.arguments))
        self.crossing = func in _CROSSING
        self.host_indices = func in _HOST_INDICES
        self.per_tensor = name.startswith(("_foreach_", "_fused_", "_amp_foreach"))
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.takes_generator = any(argument.name == "generator" for argument in func._schema.arguments)
        # Under inference mode autograd is not there to take composite operations apart, so they arrive whole.
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        )


class Dispatcher:
    """Runs operations on the tensors of one machine."""

    def __init__(self, machine: Machine, attention: Callable[..., Any]):
        self._machine = machine
        self._attention = attention
        self._rules: dict[torch._ops.OpOverload, _Rule] = {}

    def __call__(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the operation `func`.

        Raises:
            RuntimeError: its tensors are on different devices.
            torch.OutOfMemoryError: its results do not fit on their device.
        """
        rule = self._rules.get(func)
        if rule is None:
            rule = self._rules[func] = _Rule(func)
        if rule.composite:
            if func is aten.scaled_dot_product_attention.default:
                return self._attention(*args, **kwargs)
            return func.decompose(*args, **kwargs)

        tensor_class = self._machine.tensor_class
        virtual: list[VirtualTensor] = []
        plain: list[torch.Tensor] = []  # other tensors, leaving out mere numbers on the host, which go anywhere
        raw_args = [_unwrapped(arg, virtual, plain, rule, tensor_class) for arg in args]
        raw_kwargs: dict[str, Any] = {}
        if kwargs:
            leaves, structure = tree_flatten(kwargs)
            raw_kwargs = tree_unflatten(
                [_unwrapped(leaf, virtual, plain, rule, tensor_class) for leaf in leaves], structure
            )

        place = virtual[0].place if virtual else None
        if not rule.crossing:
            for tensor in virtual:
                if tensor.place != place:
                    if rule.per_tensor:
                        return _one_by_one(func, args, kwargs)
                    raise mismatch(func.name(), virtual[0], tensor)
            if plain and virtual and self._machine.separates_host:
                raise mismatch(func.name(), virtual[0], plain[0])

        device = raw_kwargs.get("device")
        if device is not None:
            place = self._machine.index_of(device) if device.type == self._machine.kind else None
            if place is not None:
                raw_kwargs["device"] = shapes.HOST
            raw_kwargs["pin_memory"] = False
            if "pin_memory" not in kwargs:
                del raw_kwargs["pin_memory"]

        _until_return = self._taken(kernels.temporary_bytes(func, raw_args), place)
        generators = self._machine.generators
        if not rule.random or place is None or generators is None:
            out = self._run(func, raw_args, raw_kwargs, virtual, place)
        elif rule.takes_generator:
            raw_kwargs["generator"] = generators.checked(raw_kwargs.get("generator"), place)
            out = self._run(func, raw_args, raw_kwargs, virtual, place)
        else:
            with generators.drawing(place):
                out = self._run(func, raw_args, raw_kwargs, virtual, place)
        watcher = self._machine.watcher
        if watcher is not None:
            watcher.ran(func, raw_args, out, place, virtual)

        if rule.mutates:
            if rule.reshapes:
                for tensor in virtual:
                    if tensor.raw.shape != tensor.shape or tensor.raw.stride() != tensor.stride():
                        follow(tensor, tensor.raw, self._machine)
            return self._restored(out, virtual, raw_args, place)
        return self._wrapped(out, place)

    def _taken(self, size: int, place: int | None) -> torch.Tensor | None:
        """Count `size` bytes on a device for as long as the returned object lives."""
        if not size or place is None:
            return None
        block = torch.empty(size, dtype=torch.uint8, device="meta")
        self._machine.ledger.hold(block, place)
        return block

    def _run(
        self,
        func: torch._ops.OpOverload,
        raw_args: list[Any],
        raw_kwargs: dict[str, Any],
        virtual: list[VirtualTensor],
        place: int | None,
    ) -> Any:
        if self._machine.shapes_only:
            return shapes.run(func, raw_args, raw_kwargs, virtual, place, self._machine)
        return kernels.REAL.get(func, func)(*raw_args, **raw_kwargs)

    def _wrapped(self, out: Any, place: int | None) -> Any:
        if isinstance(out, torch.Tensor):
            return out if place is None else wrap(out, place, self._machine)
        if isinstance(out, (list, tuple)):
            return type(out)(self._wrapped(item, place) for item in out)
        return out

    def _restored(self, out: Any, virtual: Sequence[VirtualTensor], raw_args: list[Any], place: int | None) -> Any:
        """Give back the caller's own tensors where the operation gave back the ones that it wrote to."""
        if isinstance(out, torch.Tensor):
            for tensor in virtual:
                if tensor.raw is out:
                    return tensor
            if any(arg is out for arg in raw_args):  # a plain tensor, as in cpu_tensor.copy_(virtual_tensor)
                return out
            return self._wrapped(out, place)
        if isinstance(out, (list, tuple)):
            return type(out)(self._restored(item, virtual, raw_args, place) for item in out)
        return out


def _unwrapped(
    arg: Any, virtual: list[VirtualTensor], plain: list[torch.Tensor], rule: _Rule, tensor_class: type[torch.Tensor]
) -> Any:
    kind = type(arg)
    if kind is tensor_class:
        virtual.append(arg)
        return arg.raw
    if kind is list or kind is tuple:
        return [_unwrapped(item, virtual, plain, rule, tensor_class) for item in arg]
    if isinstance(arg, torch.Tensor) and arg.dim() and not rule.host_indices:
        plain.append(arg)
    return arg


def _one_by_one(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """Run an operation on lists of tensors that span devices position by position, as CUDA's slow path does."""
    length = next(len(arg) for arg in args if isinstance(arg, (list, tuple)) and isinstance(arg[0], torch.Tensor))

    def at(value: Any, position: int) -> Any:
        is_shared = not isinstance(value, (list, tuple)) or len(value) != length
        return value if is_shared else [value[position]]

    results = []
    for position in range(length):
        named = {name: at(value, position) for name, value in kwargs.items()}
        results.append(func(*(at(arg, position) for arg in args), **named))
    return None if results[0] is None else [result[0] for result in results]
