"""A tensor on a virtual device: to torch it lives on `npu:2`, inside it wraps a CPU tensor, or a meta one.

Only the shell is here; `dispatch` runs operations on it.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .machine import Machine

_plain_data: Any = torch.Tensor.data  # the C++ property, also once `torch.Tensor.data` is replaced


class VirtualTensor(torch.Tensor):
    """Made by `wrap`. Attributes: `raw`, the tensor with the numbers (or only the shape), and `place`, the index."""

    raw: torch.Tensor
    place: int
    machine: Machine  # this and the next belong to the class, set by whoever makes the machine
    run: Callable[..., Any]  # a `dispatch.Dispatcher`

    # Results need no conversion to this class, because dispatch makes them; going without saves time on each call.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, **_: Any) -> Any:  # a Parameter
        # accelerate makes a parameter anew as type(parameter)(data, requires_grad=...).
        return torch.nn.Parameter(data, requires_grad)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return cls.run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        inside: torch.Tensor = _plain_data.__get__(self)
        return inside

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        set_data(self, value)

    def untyped_storage(self) -> Any:  # a storage, or its stand-in
        # safetensors and transformers find tensors that share memory by asking storages for their addresses.
        storage = self.raw.untyped_storage()
        return _NumberlessStorage(storage) if self.raw.is_meta else storage

    def data_ptr(self) -> int:
        if self.raw.is_meta:
            _refuse_kernels(sys._getframe(1).f_globals.get("__name__", ""))
        start: int = self.untyped_storage().data_ptr()
        return start + int(self.raw.storage_offset()) * self.raw.element_size()

    def is_shared(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has no types
        grad = ", requires_grad=True" if self.requires_grad else ""
        inside: str = torch.Tensor.__repr__(self.raw)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return f"{inside[:-1]}, device='{self.device}'{grad})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        with torch.no_grad():
            copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        else:
            copy.requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the CPU tensor inside, so that files can be read where nothing is virtual, and storages shared by
        # several tensors are written once. `torch.load(map_location=)` brings it back to a virtual device.
        raw = self.raw.detach()
        if isinstance(self, torch.nn.Parameter):
            raw = torch.nn.Parameter(raw, self.requires_grad)
        elif self.requires_grad:
            raw.requires_grad_(True)
        return raw.__reduce_ex__(protocol)


# They ask for addresses to find tensors that are the same. Whoever else asks is about to read or write there.
_ASK_FOR_IDENTITY = ("accelerate", "balance_shim", "peft", "safetensors", "torch", "transformers", "trl")


def _refuse_kernels(module: str) -> None:
    """Raise RuntimeError if `module` is to be given no address of a tensor that has only a shape.

    It would get an address in this process's own memory, and a kernel of Triton or behind ctypes would use it.
    """
    if module.partition(".")[0] in _ASK_FOR_IDENTITY and not module.startswith("torch._inductor"):
        return
    raise RuntimeError(
        f"a tensor without values has no address, which {module or 'a kernel'} asks for; its own kernels cannot run on "
        "shapes: use operations of torch, or simulate with values"
    )


class _NumberlessStorage:
    """The storage of a tensor that has only a shape: without memory it has no address, but still an identity."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage

    def data_ptr(self) -> int:
        identity: int = self._storage._cdata
        return identity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def wrap(raw: torch.Tensor, place: int, machine: Machine) -> VirtualTensor:
    """Return `raw` as a tensor on device `place`, and count its bytes there.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    machine.ledger.hold(raw, place)
    if raw.is_inference() != torch.is_inference_mode_enabled():
        # A view of an ordinary tensor is ordinary in inference mode, too, and a view of an inference tensor never is.
        with torch.inference_mode(raw.is_inference()):
            return _wrapper(raw, place, machine)
    return _wrapper(raw, place, machine)


def _wrapper(raw: torch.Tensor, place: int, machine: Machine) -> VirtualTensor:
    kind: Any = machine.tensor_class
    tensor: VirtualTensor = torch.Tensor._make_wrapper_subclass(
        kind,
        raw.shape,
        strides=raw.stride(),
        storage_offset=raw.storage_offset(),
        dtype=raw.dtype,
        device=machine.devices[place],
    )
    tensor.raw = raw
    tensor.place = place
    return tensor


def follow(tensor: VirtualTensor, raw: torch.Tensor, machine: Machine) -> None:
    """Let `tensor` stand for `raw`, whatever its shape: after an in-place operation that changes more than values."""
    machine.ledger.remeasure(raw)
    _plain_data.__set__(tensor, wrap(raw, tensor.place, machine))
    tensor.raw = raw


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Do `tensor.data = value` when at least one of them is virtual; `tensor` keeps its identity.

    torch only copies sizes and the like into the existing object. That is enough between virtual tensors, but an
    object cannot so become, or cease to be, a virtual one: then the whole inside of the object is exchanged.
    """
    if isinstance(value, VirtualTensor) and isinstance(tensor, VirtualTensor):
        _plain_data.__set__(tensor, value)
        tensor.raw, tensor.place = value.raw, value.place
        return
    fresh = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, tensor.requires_grad)
    elif fresh is not value:
        fresh.requires_grad_(tensor.requires_grad)
    grad = tensor.grad
    tensor.grad = None
    _exchange(tensor, fresh)
    if grad is not None:
        tensor.grad = grad.to(tensor.device)


def _exchange(tensor: torch.Tensor, fresh: torch.Tensor) -> None:
    """Let `tensor` be what `fresh` is. Graphs and views that use `tensor` then hold `fresh`, which stands in for it.

    `torch.utils.swap_tensors` refuses where anything else refers to the tensor, because those references would be left
    with the former inside. After torch's own `tensor.data = value` they see the new values instead, so the former
    inside gets these, too: its memory is free, and what it is used for next meets tensors of another device.
    """
    attributes = dict(tensor.__dict__)
    for name in ("raw", "place", "_is_param"):  # these belong to what the object becomes, the rest to what it is
        attributes.pop(name, None)
    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    is_shared = tensor._use_count() > 1  # type: ignore[attr-defined]  # not in torch's stubs
    for name in ("__class__", "__dict__"):
        attribute, fresh_attribute = getattr(tensor, name), getattr(fresh, name)
        setattr(tensor, name, fresh_attribute)
        setattr(fresh, name, attribute)
    torch._C._swap_tensor_impl(tensor, fresh)
    tensor.__dict__.update(attributes)
    if hooks[0] is not None:  # setting them registers them with the new inside
        tensor._backward_hooks = hooks[0]
    if hooks[1] is not None:
        tensor._post_accumulate_grad_hooks = hooks[1]
    if not is_shared:
        return
    if isinstance(fresh, VirtualTensor):
        fresh.raw, fresh.place = tensor.detach(), None  # type: ignore[assignment]
    if fresh.requires_grad and fresh.is_leaf:
        fresh.register_post_accumulate_grad_hook(_passing_on(weakref.ref(tensor)))


def _passing_on(reference: weakref.ref[torch.Tensor]) -> Callable[[torch.Tensor], None]:
    """Return a hook that adds a gradient which an older graph computes to that of the tensor as it is now."""

    def pass_on(former: torch.Tensor) -> None:
        tensor = reference()
        if tensor is not None and former.grad is not None:
            grad = former.grad.to(tensor.device, tensor.dtype)
            tensor.grad = grad if tensor.grad is None else tensor.grad + grad
        former.grad = None

    return pass_on
