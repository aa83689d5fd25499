"""Compare the loss in chunks with the loss from full logits on the card: values, gradients, time and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from balance_shim.logits.head import deferring

from .card import Card

HIDDEN, VOCABULARY = 3584, 152064


class _Head(nn.Module):
    """The end of a causal model: hidden states, a head, and cross-entropy as transformers computes it."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def compared(card: Card) -> Iterator[dict[str, Any]]:
    hidden, vocabulary, lengths = HIDDEN, VOCABULARY, (2048, 8192)
    if card.is_simulated:
        hidden, vocabulary, lengths = 128, 20000, (2048,)
    for tokens in lengths:
        for trains in (True, False):
            torch.manual_seed(0)
            with torch.device(card.device):
                model = _Head(hidden, vocabulary).to(torch.bfloat16).train()
                states = torch.randn(1, tokens, hidden, dtype=torch.bfloat16)
                labels = torch.randint(0, vocabulary, (1, tokens))
            model.requires_grad_(trains)
            record: dict[str, Any] = {"tokens": tokens, "vocabulary": vocabulary, "head_trains": trains}
            results = {}
            for way in ("full", "chunked"):
                results[way], record[way] = _measured(card, model, states, labels, way == "chunked")
            full, chunked = results["full"], results["chunked"]
            record["loss_differs_by"] = abs(full[0] - chunked[0])
            record["gradients_differ_by"] = [
                float((one.float() - other.float()).abs().max() / one.float().abs().max().clamp_min(1e-30))
                for one, other in zip(full[1], chunked[1], strict=True)
            ]
            yield record
            del model, states, labels, results, full, chunked
            card.empty()


def _measured(card: Card, model: _Head, states: torch.Tensor, labels: torch.Tensor, chunked: bool) -> tuple[Any, Any]:
    """Return ((loss, gradients), {peaks and seconds}) of one way."""
    result_of_step: list[Any] = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        inputs = states.clone().requires_grad_()
        with deferring(model) if chunked else contextlib.nullcontext():
            loss = model(inputs, labels)
            loss.backward()
        result_of_step[:] = [
            float(loss.detach()),
            [inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)],
        ]

    before = card.module.memory_allocated(0)
    with card.measured() as peaks:
        step()
    result = (result_of_step[0], [grad.cpu() for grad in result_of_step[1]])
    result_of_step.clear()
    seconds = card.seconds(step, repeats=5)
    result_of_step.clear()
    return result, {**peaks[0].to_json(), "allocated_before": before, "seconds": seconds}
