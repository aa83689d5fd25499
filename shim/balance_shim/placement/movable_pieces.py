"""The tensors of a model that change device under another map, including those that depend on them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import copies
from ..errors import MoveError
from ..map_file import OFFLOADED, DeviceMap

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Quantization state of bitsandbytes: `weight.quant_state` (nested as `state2`), `module.state` of 8-bit layers.
STATES = ("quant_state", "state", "state2")
# Names that PEFT puts between a module and its place in the model, once the module has an adapter.
ADAPTED = ("base_layer", "original_module")


class Places:
    """A device map, asked for the device of each module and tensor of one model.

    Attributes:
        device_map: as given; its values are what accelerate's hooks and `hf_device_map` hold.
        first: the device, as the map has it, where inputs are sent.
        several: whether the map has more than one device.
    """

    def __init__(self, model: "nn.Module", device_map: DeviceMap):
        self.device_map = device_map
        self._devices = {key: _as_device(key, value) for key, value in device_map.items()}
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
        self._keys: dict[str, str] = {}
        for name in names:
            key = self._key(name)
            if key is None:
                raise MoveError(f"the device map has no device for {name}")
            self._keys[name] = key
        # Trainers put inputs there. accelerate 1.15 takes it, too; older ones the device that the map names first.
        lowest = min(self._devices, key=lambda key: self._devices[key].index)
        self.first = device_map[lowest]
        self.several = len(set(self._devices.values())) > 1

    def block_of(self, tensor_name: str) -> str:
        """Return the key that decides on a tensor."""
        return self._keys[tensor_name]

    def device_of(self, tensor_name: str) -> "torch.device":
        return self._devices[self._keys[tensor_name]]

    def of_module(self, name: str) -> int | str | None:
        """Return where a module runs, as the map has it; None for one whose parts are placed one by one."""
        key = self._key(name)
        return None if key is None else self.device_map[key]

    def _key(self, name: str) -> str | None:
        """Return the longest key at or above `name`, whichever of PEFT's names are in it."""
        plain = ".".join(part for part in name.split(".") if part not in ADAPTED)
        keys = [key for spelling in {name, plain} if (key := _longest_key(spelling, self.device_map)) is not None]
        return max(keys, key=len, default=None)


@dataclass
class Piece:
    """Tensors that are one piece of memory: usually one, several where weights are tied.

    Attributes:
        block: the key of the map that decides on it.
        tensors: every tensor object that shares the memory.
        goal: where it has to be.
    """

    block: str
    tensors: "list[Tensor]"
    goal: "torch.device"

    @property
    def device(self) -> "torch.device":
        """Where it is now."""
        return self.tensors[0].device

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.tensors[0].numel() * self.tensors[0].element_size()

    def put(self, device: "torch.device") -> None:
        """Move it. The tensors stay the objects that they are, and go on sharing their memory."""
        fresh = copies.moved(self.tensors[0].data, device)
        for tensor in self.tensors:
            tensor.data = fresh


def to_move(model: "nn.Module", places: Places, optimizers: "Iterable[torch.optim.Optimizer]" = ()) -> list[Piece]:
    """Return the pieces that are not where `places` puts them, in the model's order.

    Raises:
        MoveError: the map wants tied weights on two devices.
    """
    from torch import nn
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    pieces: dict[Any, Piece] = {}
    names: dict[Any, str] = {}
    for name, tensor, owner in _tensors(model, tuple(optimizers)):
        key = _memory(tensor)
        goal = places.device_of(owner)
        piece = pieces.get(key)
        if piece is None:
            pieces[key], names[key] = Piece(places.block_of(owner), [tensor], goal), owner
            continue
        if all(tensor is not other for other in piece.tensors):
            piece.tensors.append(tensor)
        if piece.goal != goal:
            if any(isinstance(member, nn.Parameter) for member in (*piece.tensors, tensor)):
                raise MoveError(f"{names[key]} and {name} are one tensor, but the map has them on two devices")
            # A buffer of a module that several blocks share: accelerate, too, leaves it where the last of them is.
            piece.block, piece.goal = places.block_of(owner), goal
    moving = [piece for piece in pieces.values() if piece.device != piece.goal]
    for piece in moving:
        if piece.device.type == "meta":
            raise MoveError("some weights are on the meta device: offloaded, or not loaded yet")
        if is_traceable_wrapper_subclass(piece.tensors[0]):  # a parameter of this kind was refused before
            kind = type(piece.tensors[0]).__name__
            raise MoveError(f"buffers or optimizer state of {piece.block} are {kind}, which wraps tensors of its own")
    return moving


def refuse_unmovable(model: "nn.Module") -> None:
    """Raise `MoveError` if the model holds something that breaks when its tensors change their memory in place."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    for name, module in model.named_modules():
        why = None
        hook = vars(module).get("_hf_hook")
        if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
            why = "its weights are offloaded to the host or to disk"
        elif isinstance(module, torch.jit.ScriptModule):
            why = "it is a compiled TorchScript module"
        elif type(module).__name__ in ("HQQLinear", "Mxfp4GptOssExperts", "FullyShardedDataParallel"):
            why = f"{type(module).__name__} manages device memory of its own"
        elif any(vars(module).get(handle) is not None for handle in ("q4", "q_handle")):
            why = "its quantized weights are known to a kernel by their address"
        for key, parameter in module._parameters.items():
            if parameter is None or why:
                continue
            if hasattr(parameter, "ds_id"):
                why = f"{key} is partitioned by DeepSpeed ZeRO-3"
            elif is_traceable_wrapper_subclass(parameter):
                why = f"{key} is a {type(parameter).__name__}, which wraps tensors of its own"
        if why:
            raise MoveError(f"blocks cannot be moved in place: {name or 'the model'}: {why}")


def _tensors(
    model: "nn.Module", optimizers: "tuple[torch.optim.Optimizer, ...]"
) -> "Iterator[tuple[str, Tensor, str]]":
    """Yield each tensor that may have to move, with its name and that of the parameter or buffer it goes with."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = f"{prefix}." if prefix else ""
        own: list[tuple[str, Tensor]] = []
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{inside}{key}"
            own.append((name, parameter))
            yield name, parameter, name
            if parameter.grad is not None:
                yield f"{name}.grad", parameter.grad, name
            for attached in [vars(parameter), *(optimizer.state.get(parameter, {}) for optimizer in optimizers)]:
                for label, tensor in _attached(attached):
                    if tensor.device == parameter.device:  # Adam keeps its count of steps on the host
                        yield f"{name}.{label}", tensor, name
        for key, buffer in module._buffers.items():
            if buffer is not None:
                own.append((f"{inside}{key}", buffer))
                yield f"{inside}{key}", buffer, f"{inside}{key}"
        # Plain attributes that are tensors (a rotary embedding's first frequencies) are where the module's others are.
        for label, tensor in _attached(vars(module)):
            neighbour = next((name for name, other in own if other.device == tensor.device), None)
            if neighbour is not None:
                yield f"{inside}{label}", tensor, neighbour


def _attached(attributes: Mapping[str, Any]) -> "Iterator[tuple[str, Tensor]]":
    """Yield the tensors among an object's attributes, and in the states that quantization libraries keep there."""
    import torch

    for key, value in attributes.items():
        if isinstance(value, torch.Tensor):
            yield key, value
        elif key in STATES and hasattr(value, "__dict__"):
            for label, tensor in _attached(vars(value)):
                yield f"{key}.{label}", tensor


def _memory(tensor: "Tensor") -> Any:
    """Return a key that is equal for two tensors that are the same piece of memory."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    if is_traceable_wrapper_subclass(tensor) or not tensor.data_ptr():
        return id(tensor)  # wrappers (torchao's weights) have no memory of their own, and all answer 0
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _as_device(name: str, value: Any) -> "torch.device":
    import torch

    from .. import devices

    kind, count = devices.accelerator_type(), devices.count()
    if value in OFFLOADED:
        raise MoveError(f"{name!r} is mapped to {value}; blocks move between accelerators only")
    device = torch.device(kind or "cpu", value) if isinstance(value, int) else torch.device(value)
    if kind is None or device.type != kind or device.index is None or device.index >= count:
        raise MoveError(f"{name!r} is mapped to {value}, and there is no such device here")
    return device


def _longest_key(name: str, device_map: DeviceMap) -> str | None:
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name
