"""`transformers.integrations.sdpa_attention`: grouped queries of placed models."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import log
from ..patching import registry
from ..placement import placed_models
from ..virtual import grouped_attention


def apply(module: ModuleType) -> None:
    """Patch the question whether grouped queries go to torch as they are; before 4.54 they never do."""
    if callable(getattr(module, grouped_attention.NAME, None)):
        registry.replace(module, grouped_attention.NAME, _around)


def _around(original: Callable[..., bool]) -> Callable[..., bool]:
    return grouped_attention.around_use_gqa(original, _is_of_a_placed_model, _log)


def _is_of_a_placed_model(_: Any) -> bool:
    return bool(placed_models.placed_models())


def _log(key: Any) -> None:
    if key.device.type != "cpu":  # a trace's
        log.once(
            "info",
            "attention: keys and values are repeated for all query heads, as torch has no fused kernel for grouped "
            f"queries in {grouped_attention.kind_of(key)} and would keep a matrix of sequence length squared per head",
        )
