"""Tokens: sequences, choices of sequences, and the masks and ids that go with each token."""

import torch

from ....upstream.model_ends import input_embedding
from .wants import Batch, Wants, whole_numbers

CHOICES = 2  # of a multiple-choice question


def text(wants: Wants) -> Batch:
    """Return token ids of `wants.rows` full sequences, with mask, and boxes for models of documents."""
    rows, tokens = wants.rows, longest(wants)
    shape = (rows, CHOICES, tokens) if wants.kind.endswith("ForMultipleChoice") else (rows, tokens)
    ids = whole_numbers(*shape, value=_plain_token(wants))
    ends = _tokens(wants, "eos_token_id")
    if "Classification" in wants.kind and ends:
        ids[..., -1] = ends[0]  # by which Bart and T5 find the end of a sequence
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "bbox" in wants.accepted:
        batch["bbox"] = whole_numbers(*shape, 4)
    return batch


def longest(wants: Wants) -> int:
    """Return the tokens of a sequence: as many as asked for, but no more than learned positions there are."""
    around = _holder_of_embedding(wants)
    positions = [
        buffer.shape[-1]
        for name, buffer in wants.model.named_buffers()
        if name.rpartition(".")[2] == "position_ids" and buffer.dim() == 2 and _is_of_text(name, around)
    ]
    return min([wants.tokens, *positions[:1]])


def _is_of_text(name: str, around: str | None) -> bool:
    """Whether positions are those of tokens: next to the embedding of these, and not in a tower."""
    if around is None:
        return "vision" not in name
    return name.rpartition(".")[0] == around


def _holder_of_embedding(wants: Wants) -> str | None:
    """Return the name of the module that holds the embedding of tokens; None where the model does not tell."""
    embedding = input_embedding(wants.model)
    if embedding is None:
        return None
    names = (name for name, module in wants.model.named_modules() if module is embedding)
    return next((name.rpartition(".")[0] for name in names), None)


def _plain_token(wants: Wants) -> int:
    """Return a token that stands for nothing special."""
    special = [token for name in ("pad_token_id", "eos_token_id", "bos_token_id") for token in _tokens(wants, name)]
    return next(token for token in (1, 3, 4, 5) if token not in special)


def _tokens(wants: Wants, name: str) -> list[int]:
    """Return the tokens that the config has under `name`: one, several (the ends of Llama 3.1's turns), or none."""
    value = wants.text(name)
    several = value if isinstance(value, (list, tuple)) else [value]
    return [token for token in several if isinstance(token, int)]
