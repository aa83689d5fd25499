"""Reading fields of a configuration that may stand in one of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PARTS = (
    "text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config", "encoder_config",
    "decoder_config", "thinker_config", "llm_config", "vision_encoder_config", "qformer_config", "language_config",
)  # fmt: skip


def parts(config: Any) -> Iterator[Any]:
    """Yield `config` and the configurations that it holds."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict"):
            yield from parts(value)


def lookup(config: Any, *names: str, default: Any = None, inside: str = "") -> Any:
    """Return the first of the fields `names` that has a value, in `config` or in one of its parts.

    `inside`: a word that the name of the part has to have, such as "vision"; parts named otherwise are the last resort.
    """
    if inside:
        for name, value in vars(config).items():
            if inside in name and hasattr(value, "to_diff_dict"):
                value = lookup(value, *names)
                if value is not None:
                    return value
    for part in parts(config):
        for name in names:
            try:
                value = getattr(part, name, None)
            except Exception:
                value = None
            if value is not None:
                return value
    return default
