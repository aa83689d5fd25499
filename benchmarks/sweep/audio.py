"""Sounds: waves, or features of them, in the forms that speech models take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .fields import lookup
from .pictures import Inputs
from .targets import Example

SAMPLES = 8000
FRAMES = 64


def of(model: Any, parameters: set[str], length: int) -> Iterator[Inputs]:
    """Yield the forms of sound that `model` might take."""
    config = model.config
    mels = lookup(
        config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "num_mel_features",
        default=16,
    )
    positions = lookup(config, "max_source_positions", inside="audio")
    waves = ("input_values",) if "input_values" in parameters else ()
    if "audio_values" in parameters:
        waves = ("audio_values",)

    def wave(name: str) -> Inputs:
        return Inputs(lambda generator: {name: torch.randn(SAMPLES, generator=generator)}, (name,))

    if waves and hasattr(config, "num_mel_bins"):
        yield _features(waves[0], (lookup(config, "max_length", default=FRAMES), mels), parameters)
    for name in waves:
        yield wave(name)
    for name in ("input_features", "audio_features"):
        if name not in parameters:
            continue
        frames = [2 * positions, FRAMES] if positions else [FRAMES]
        for frame_count in frames:
            for shape in ((frame_count, mels), (mels, frame_count)):
                if "input_ids" in parameters and "decoder_input_ids" not in parameters:
                    yield from with_words(model, parameters, name, shape, length)
                else:
                    yield _features(name, shape, parameters)


def _features(name: str, shape: tuple[int, int], parameters: set[str]) -> Inputs:
    def example(generator: torch.Generator) -> Example:
        inputs: Example = {name: torch.randn(shape, generator=generator)}
        if "attention_mask" in parameters and shape[0] > shape[1]:
            inputs["attention_mask"] = torch.ones(shape[0], dtype=torch.long)
        return inputs

    return Inputs(example, (name,))


def with_words(model: Any, parameters: set[str], name: str, shape: tuple[int, int], length: int) -> Iterator[Inputs]:
    """Yield sounds whose places are marked in a text; how many there are, the model says when it is asked."""
    token = lookup(model.config, "audio_token_id", "audio_token_index", "audio_placeholder_token_id")
    if token is None:
        return

    def example_of(places: int):
        def example(generator: torch.Generator) -> Example:
            ids = torch.randint(8, 200, (length,), generator=generator)
            sounds = torch.full((places,), token)
            inputs: Example = {
                "input_ids": torch.cat([ids[:4], sounds, ids[4:]]),
                "attention_mask": torch.ones(length + places, dtype=torch.long),
                name: torch.randn(shape, generator=generator),
            }
            frames = max(shape)
            for mask in ("input_features_mask", "feature_attention_mask", "audio_attention_mask"):
                if mask in parameters:
                    inputs[mask] = torch.ones(frames, dtype=torch.long)
            return inputs

        return example

    from .pictures import counted

    yield from counted(model, example_of, (name, "input_ids"), frozenset())
