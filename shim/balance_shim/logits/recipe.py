"""How deferred logits are computed: from rows of hidden states, the head, and operations on its output row by row.

Shapes: N rows, H hidden size, V vocabulary; rows may have any leading dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class TrainingStep(Protocol):
    """The training step that logits belong to, which knows every tensor that stands for them (`deferred.Step`)."""

    shells: list[Any]

    def settle(self) -> None:
        """Make the values of all of them."""


@dataclass(frozen=True)
class Recipe:
    """How to compute logits, in full or chunk by chunk.

    Attributes:
        rows: hidden states [..., H], on the head's device.
        head: hidden states [..., H] -> logits [..., V]; each row by itself.
        steps: the operations that follow, each row by itself again: conversions, scaling, soft-capping, softmax.
        sample: the result for one row [1, V], which shows dtype, device and vocabulary.
        parameters: those of the head that train.
        chunk: rows at once.
        step: the training step whose logits these are.
        view: makes from other logits, in full, the view that these are; None for logits of their own.
        differentiable: whether gradients flow, as they would through logits that were made at the same place.
    """

    rows: torch.Tensor
    head: Step
    sample: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    chunk: int
    step: TrainingStep
    steps: tuple[Step, ...] = ()
    view: Step | None = None
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
        view = step if sample is self.sample else None  # nothing to convert
        return replace(self, steps=(*self.steps, step), sample=sample, view=view, differentiable=self._flows())

    def of_rows(self, select: Step, view: Step | None) -> "Recipe":
        """Return the recipe for other rows, or the same in another shape; `select` keeps the last dimension."""
        return replace(self, rows=select(self.rows), view=view, differentiable=self._flows())

    def detached(self) -> "Recipe":
        return replace(self, view=torch.Tensor.detach, differentiable=False)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the result for `rows` [..., H] -> [..., V]."""
        result = self.head(rows)
        for step in self.steps:
            result = step(result)
        return result

    def in_full(self) -> torch.Tensor:
        """Return everything at once."""
        return self.undisturbed(self.values, self.rows)

    def undisturbed(self, function: Step, whole: Any) -> torch.Tensor:
        """Return `function(whole)` as at the place where these logits were made, wherever somebody needs it.

        That may be in inference mode, or where tensors are saved in some way (activation checkpointing, which counts
        them): the values are for others, too.
        """
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.differentiable),
            saved_tensors_hooks(_as_it_is, _as_it_is),
        ):
            return function(whole)

    def by_chunks(self, function: Callable[..., Any], *aligned: torch.Tensor) -> list[Any]:
        """Return `function(values [n, V], *rows of aligned)` for each chunk, recomputed in the backward pass.

        Args:
            aligned: tensors with a row for each of ours in their first dimension.
        """

        def run(rows: torch.Tensor, *parts: torch.Tensor) -> Any:
            return function(self.values(rows), *parts)

        flows = self._flows()
        with torch.set_grad_enabled(flows):
            # One split and not many slices: its backward pass puts the gradients of all chunks together once.
            flat = self.rows.reshape(-1, self.rows.shape[-1])
            chunks = zip(*(tensor.split(self.chunk) for tensor in (flat, *aligned)), strict=True)
            if not flows:
                return [run(*parts) for parts in chunks]
            return [checkpoint(run, *parts, use_reentrant=False, preserve_rng_state=False) for parts in chunks]

    def _flows(self) -> bool:
        return self.differentiable and torch.is_grad_enabled()


def _as_it_is(saved: Any) -> Any:
    return saved
