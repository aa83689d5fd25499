"""The parameters of each block: which it counts, which of them train, and their bytes as they will be loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import estimate
from .blocks import Block
from .training_case import TrainingCase

if TYPE_CHECKING:
    from torch import Tensor


class BlockParameters:
    """The parameters of the blocks of one case.

    Attributes:
        own: block name -> parameter name -> parameter. Tied ones are under the last of their blocks only.
    """

    def __init__(self, case: TrainingCase) -> None:
        self._case = case
        self._named: dict[str, Tensor] = dict(case.model.named_parameters(remove_duplicate=False))
        self._buffers = dict(case.model.named_buffers(remove_duplicate=False))
        self._embeddings: set[int] | None = None
        self.own = self._without_tied()

    def sizes(self, block: Block) -> list[int]:
        """Return the bytes of each tensor of `block` as it will be loaded."""
        size_of = self._case.parameter_bytes or (lambda _, tensor: tensor.numel() * tensor.element_size())
        buffers = (self._buffers[name] for name in block.buffers)
        return [
            *(int(size_of(name, parameter)) for name, parameter in self.own[block.name].items()),
            *(buffer.numel() * buffer.element_size() for buffer in buffers),
        ]

    def trained(self, block: Block) -> "list[Tensor]":
        """Return the parameters of `block` that train; for LoRA one tensor as large as its adapters will be."""
        return self._trained(block, self.own[block.name])

    def looked_up(self, block: Block) -> int:
        """Return the number of trained values of `block` that are, or will be tied to, the weight of an embedding."""
        if self._embeddings is None:
            self._embeddings = self._weights_of_embeddings()
        return sum(parameter.numel() for parameter in self.trained(block) if id(parameter) in self._embeddings)

    def fresh_gradients(self) -> dict[str, int]:
        """Return block name -> bytes of its gradients of tied parameters, which are added to those of later blocks.

        For a moment there are two: for an embedding that is tied to the head when all other gradients are there, too.
        """
        sizes: dict[str, int] = {}
        if self._case.workload.tuning == "lora" and self._case.trains is None:
            return sizes
        for group in self._case.structure.ties:
            *earlier, last = [block for block in self._case.structure.blocks if not group.isdisjoint(block.parameters)]
            shared = {name: parameter for name, parameter in self.own[last.name].items() if name in group}
            size = sum(parameter.numel() * parameter.element_size() for parameter in self._trained(last, shared))
            for block in earlier:
                sizes[block.name] = sizes.get(block.name, 0) + size
        return sizes

    def _trained(self, block: Block, own: "Mapping[str, Tensor]") -> "list[Tensor]":
        import torch

        trains, tuning = self._case.trains, self._case.workload.tuning
        if trains is not None:
            return [parameter for name, parameter in own.items() if trains(name, parameter)]
        if tuning == "lora":
            values = estimate.adapter_values(block, list(own.values()))
            return [torch.empty(values, dtype=torch.float32, device="meta")] if values else []
        if tuning == "frozen" and block.role == "tower":
            return []
        return [parameter for parameter in own.values() if parameter.is_floating_point()]

    def _weights_of_embeddings(self) -> set[int]:
        from torch import nn

        weights = {id(module.weight) for module in self._case.model.modules() if isinstance(module, nn.Embedding)}
        for group in self._case.structure.ties:
            identities = {id(self._named[name]) for name in group}
            if identities & weights:
                weights |= identities
        return weights

    def _without_tied(self) -> "dict[str, dict[str, Tensor]]":
        structure = self._case.structure
        identity: dict[str, Any] = {name: -1 - number for number, group in enumerate(structure.ties) for name in group}

        def of(name: str) -> int:
            return int(identity.get(name, id(self._named[name])))

        last = {of(name): name for block in structure.blocks for name in block.parameters}
        return {
            block.name: {name: self._named[name] for name in block.parameters if last[of(name)] == name}
            for block in structure.blocks
        }
