"""Cross-device errors: recognize one, and name the blocks whose tensors were on different devices.

Read from the exception and its traceback, after the fact: a step that succeeds costs nothing.
"""

import re
import traceback
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..memory.blocks import holder_of

if TYPE_CHECKING:
    from torch import nn

# In the words of torch 2.5 to 2.13 for CUDA, of torch_npu, of its indexing, concatenation, losses, cuDNN and autograd,
# and of trainers that compare devices themselves (TRL's distillation). All lower case.
_WORDS = re.compile(
    r"found at least two devices|to be on the same device|must be on the same device|should be on the same device"
    r"|either on \S+ or on the same device|are not at the same device|not on the same device"
    r"|different from other tensors on|on different devices|located on different gpus|same gpu|same device as"
    r"|returned an invalid gradient at index \d+ - expected device|but expected (?:it|them) to be on"
)
_TWO = re.compile(r"two devices, (\w+)(?::\d+)? and (\w+)")
_NUMBERED = re.compile(r"\b(?:cuda|npu|xpu|mlu|hpu):(\d+)")
MOST_NODES = 4000  # of an autograd graph that are looked at for one tensor
MOST_LEVELS = 3  # of containers in a variable that are looked through


@dataclass(frozen=True)
class Crossing:
    """The blocks and devices whose tensors met in a step that stopped.

    Attributes:
        blocks: the names of the blocks that the tensors come from, None among them for the inputs; fewer than two
            where the traceback does not show it.
        devices: the indices of the devices that the message names.
    """

    blocks: frozenset[str | None] = frozenset()
    devices: frozenset[int] = frozenset()


def is_cross_device(failure: BaseException) -> bool:
    """Whether `failure` says that accelerators met. A tensor left on the host is a mistake that no map mends."""
    if not isinstance(failure, (RuntimeError, ValueError)):
        return False
    text = str(failure).lower()
    two = _TWO.search(text)
    return bool(_WORDS.search(text)) and not (two and {"cpu", "meta"} & {two[1], two[2]})


def crossing_of(
    failure: BaseException, model: "nn.Module", blocks: Collection[str], kind: str, first_device: int
) -> Crossing:
    """Return the blocks and devices whose tensors met when `failure` was raised.

    Args:
        model: the model that was placed.
        blocks: the names of its blocks.
        kind: type of its devices, "cuda".
        first_device: index of the device where inputs arrive.
    """
    named = frozenset(int(number) for number in _NUMBERED.findall(str(failure)))
    owners = _Owners(model, blocks)
    for frame in reversed(list(_frames(failure))):
        if _is_ours(frame):
            continue
        tensors = {id(tensor): tensor for value in list(frame.f_locals.values()) for tensor in _tensors(value)}
        on_devices = [tensor for tensor in tensors.values() if tensor.device.type == kind]
        if len(named) > 1:
            on_devices = [tensor for tensor in on_devices if tensor.device.index in named]
        places = {tensor.device.index for tensor in on_devices}
        this = owners.of_module(frame.f_locals.get("self"))
        if this is not None and owners.device(this) not in (None, *places) and (not named or places):
            places.add(owners.device(this))
        else:
            this = None
        if len(places) < 2:
            continue
        origins = {owners.of_tensor(tensor, first_device) for tensor in on_devices} - {_UNKNOWN}
        met = frozenset(origins) | ({this} if this is not None else set())
        if len(met) > 1:
            return Crossing(met, named or frozenset(places))
    return Crossing(devices=named)


def let_go(failure: BaseException) -> None:
    """Drop the variables of all frames that `failure` came through, which hold the activations of a pass."""
    traceback.clear_frames(failure.__traceback__)
    for frame in _frames(failure):
        if not _is_ours(frame):
            # Up to Python 3.12 a frame keeps what it was last asked for, until it is asked again.
            frame.f_locals  # noqa: B018
    vars(failure).pop("tensors", None)  # simulated devices name the two


def _is_ours(frame: Any) -> bool:
    return bool(frame.f_globals.get("__name__", "").partition(".")[0] == "balance_shim")


_UNKNOWN = ""


class _Owners:
    """The block of a parameter, a module, or a tensor computed with them."""

    def __init__(self, model: "nn.Module", blocks: Collection[str]) -> None:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._tensors = {id(tensor): holder_of(_plain(name), blocks) for name, tensor in tensors}
        self._modules = {id(module): holder_of(_plain(name), blocks) for name, module in model.named_modules() if name}
        self._devices = {holder_of(_plain(name), blocks): tensor.device.index for name, tensor in reversed(tensors)}

    def of_module(self, module: Any) -> str | None:
        """Return the block of a module, or that it is in."""
        return self._modules.get(id(module))

    def device(self, block: str) -> int | None:
        """Return the index of the device that a block is on."""
        return self._devices.get(block)

    def of_tensor(self, tensor: Any, first_device: int) -> str | None:
        """Return the block whose parameter was last in making `tensor`; None: inputs."""
        if id(tensor) in self._tensors:
            return self._tensors[id(tensor)] or _UNKNOWN
        if tensor.grad_fn is None:
            return None if tensor.device.index == first_device else _UNKNOWN
        waiting: deque[Any] = deque([tensor.grad_fn])
        visited: set[Any] = set()
        while waiting and len(visited) < MOST_NODES:
            node = waiting.popleft()
            parameter = getattr(node, "variable", None)
            if parameter is not None and parameter.device == tensor.device and self._tensors.get(id(parameter)):
                return self._tensors[id(parameter)] or _UNKNOWN
            for following, _ in node.next_functions:
                if following is not None and following not in visited:
                    visited.add(following)
                    waiting.append(following)
        return _UNKNOWN


def _plain(name: str) -> str:
    """Return the name that a tensor or module had before PEFT wrapped its parent."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _frames(failure: BaseException) -> Iterator[Any]:
    entry = failure.__traceback__
    while entry is not None:
        yield entry.tb_frame
        entry = entry.tb_next


def _tensors(value: Any, levels: int = MOST_LEVELS) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif levels and isinstance(value, (Mapping, list, tuple)) and len(value) < 1000:
        for item in list(value.values()) if isinstance(value, Mapping) else value:
            yield from _tensors(item, levels - 1)
