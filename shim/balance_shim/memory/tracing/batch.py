"""The inputs of a traced model, as virtual tensors; `inputs` supplies them for a model without a batch."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ...virtual.machine import Machine
from .machine import traced


def on_first_device(batch: Mapping[str, Any], model: nn.Module, machine: Machine) -> dict[str, Any]:
    """Return the entries of `batch` that `model` accepts, as traced tensors on the device where inputs arrive."""
    accepted = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    return {
        name: tree_map_only(torch.Tensor, lambda tensor: traced(tensor, 0, machine), value)
        for name, value in batch.items()
        if anything or name in accepted
    }


def size_of(batch: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors in `batch`."""
    tensors = (leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
