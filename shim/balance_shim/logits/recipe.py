"""What deferred logits are made of: rows of hidden states, the head, and what is done to its output row by row.

Shapes: N rows, H hidden size, V vocabulary; rows may have any leading dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.utils.checkpoint import checkpoint

Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to compute logits, in full or chunk by chunk.

    Attributes:
        rows: hidden states [..., H], on the head's device.
        head: hidden states [..., H] -> logits [..., V]; each row by itself.
        steps: what follows, each row by itself again: conversions, scaling, soft-capping, softmax.
        sample: the result for one row [1, V], which shows dtype, device and vocabulary.
        parameters: those of the head that train.
        chunk: rows at once.
        differentiable: whether gradients flow, as they would through logits that were made at the same place.
    """

    rows: torch.Tensor
    head: Step
    sample: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    chunk: int
    steps: tuple[Step, ...] = ()
    differentiable: bool = True

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape[:-1], self.sample.shape[-1]))

    def then(self, step: Step) -> "Recipe":
        """Return the recipe with one step more."""
        with torch.no_grad():
            sample = step(self.sample)
        if sample.shape != self.sample.shape:
            raise ValueError("a step must keep the shape")
        return replace(self, steps=(*self.steps, step), sample=sample, differentiable=self._flows())

    def of_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> "Recipe":
        """Return the recipe for other rows, or the same in another shape; `select` keeps the last dimension."""
        return replace(self, rows=select(self.rows), differentiable=self._flows())

    def detached(self) -> "Recipe":
        return replace(self, differentiable=False)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the result for `rows` [..., H] -> [..., V]."""
        found = self.head(rows)
        for step in self.steps:
            found = step(found)
        return found

    def in_full(self) -> torch.Tensor:
        """Return everything at once."""
        with torch.set_grad_enabled(self.differentiable):
            return self.values(self.rows)

    def by_chunks(self, function: Callable[..., Any], *others: torch.Tensor) -> list[Any]:
        """Return `function(values [n, V], *rows of others)` for each chunk, recomputed in the backward pass.

        Args:
            others: have a row for each of ours in their first dimension.
        """

        def run(rows: torch.Tensor, *parts: torch.Tensor) -> Any:
            return function(self.values(rows), *parts)

        flows = self._flows()
        with torch.set_grad_enabled(flows):
            # One split and not many slices: its backward pass puts the gradients of all chunks together once.
            flat = self.rows.reshape(-1, self.rows.shape[-1])
            chunks = zip(*(each.split(self.chunk) for each in (flat, *others)), strict=True)
            if not flows:
                return [run(*parts) for parts in chunks]
            return [checkpoint(run, *parts, use_reentrant=False, preserve_rng_state=False) for parts in chunks]

    def _flows(self) -> bool:
        return self.differentiable and torch.is_grad_enabled()
