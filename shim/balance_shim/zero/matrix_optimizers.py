"""Optimizers that treat a weight as a matrix: ZeRO-3 has flat pieces of weights to give them."""

from typing import Any

from .. import log, zero_support

# Parts of class names, in lower case: transformers' and torch's own, and those of galore-torch, apollo-torch, dion, ...
NAMES = ("adafactor", "galore", "apollo", "muon", "shampoo", "soap", "came", "dion")


def warn(optimizer: Any) -> None:
    """Warn once if `optimizer`, or the one that it wraps, factors or rotates the matrix that it updates."""
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__
    if any(part in name.lower() for part in NAMES):
        log.once("warning", zero_support.sentence("matrix_optimizer", optimizer=name))
