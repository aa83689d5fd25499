"""One copy of a tensor on each device for all modules there that take it.

accelerate's hooks copy rotary embeddings, masks and positions from the first device anew for every layer. Layers on one
device share such tensors with each other in a model that is not placed, so a copy may be shared just as well.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch

from .copies import cross, is_plain


@dataclass
class _Source:
    """A tensor that was copied.

    Attributes:
        tensor: a weak reference.
        copies: device -> (what returns the copy, version of the source and of the copy when it was made).
    """

    tensor: "ref[torch.Tensor]"
    copies: dict[torch.device, tuple[Any, int, int]] = field(default_factory=dict)


class SharedCopies:
    """The copies of a step. A copy lives as long as its source; one with a gradient as long as somebody uses it."""

    def __init__(self) -> None:
        self._sources: dict[int, _Source] = {}
        self.made = 0

    def on(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return `tensor` on `device`: itself, the copy that is there, or a new one.

        A copy is used again if nothing has changed it or its source in place.
        """
        if tensor.device == device:
            return tensor
        if not is_plain(tensor) or tensor.is_inference() or torch.is_inference_mode_enabled():
            return cross(tensor, device)
        source = self._sources.get(id(tensor))
        if source is None or source.tensor() is not tensor:
            source = self._sources[id(tensor)] = _Source(ref(tensor, self._forgetting(id(tensor))))
        differentiable = tensor.requires_grad and torch.is_grad_enabled()
        entry = source.copies.get(device)
        if entry is not None:
            copy = entry[0]()
            if (
                copy is not None
                and entry[1:] == (tensor._version, copy._version)
                and copy.requires_grad == differentiable
            ):
                return copy  # type: ignore[no-any-return]
        copy = cross(tensor, device)
        self.made += 1
        # Hidden states pass one boundary, and only autograd decides how long they are needed.
        held = ref(copy) if tensor.requires_grad else _Held(copy)
        source.copies[device] = held, tensor._version, copy._version
        return copy

    def clear(self) -> None:
        """Let go of all copies."""
        self._sources.clear()

    def _forgetting(self, key: int) -> Any:
        sources = ref(self)

        def forget(gone: Any) -> None:
            copies = sources()
            source = None if copies is None else copies._sources.get(key)
            if copies is not None and source is not None and source.tensor is gone:
                del copies._sources[key]

        return forget


class _Held:
    """A strong reference that is called like a weak one."""

    __slots__ = ("_copy",)

    def __init__(self, copy: torch.Tensor) -> None:
        self._copy = copy

    def __call__(self) -> torch.Tensor:
        return self._copy
