"""Tokens: sequences, choices of sequences, and what goes with each token."""

import torch

from .wants import Batch, Wants, whole_numbers

CHOICES = 2  # of a multiple-choice question


def text(wants: Wants) -> Batch:
    """Return token ids of `wants.rows` full sequences, with mask, and boxes for models of documents."""
    rows, tokens = wants.rows, longest(wants)
    shape = (rows, CHOICES, tokens) if wants.kind.endswith("ForMultipleChoice") else (rows, tokens)
    ids = whole_numbers(*shape, value=_plain_token(wants))
    eos = wants.text("eos_token_id")
    if "Classification" in wants.kind and isinstance(eos, int):
        ids[..., -1] = eos  # by which Bart and T5 find the end of a sequence
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "bbox" in wants.accepted:
        batch["bbox"] = whole_numbers(*shape, 4)
    return batch


def longest(wants: Wants) -> int:
    """Return the tokens of a sequence: as many as asked for, but no more than learned positions there are."""
    positions = [
        buffer.shape[-1]
        for name, buffer in wants.model.named_buffers()
        if name.rpartition(".")[2] == "position_ids" and "vision" not in name and buffer.dim() == 2
    ]
    return min([wants.tokens, *positions[:1]])


def _plain_token(wants: Wants) -> int:
    """Return a token that stands for nothing special."""
    special = {wants.text(name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return next(token for token in (1, 3, 4, 5) if token not in special)
