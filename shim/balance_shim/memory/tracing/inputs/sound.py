"""Sound: samples or spectra of clips, by themselves or among the tokens of a language model."""

from math import prod
from typing import Any

import torch

from .wants import Batch, Wants, first_of, whole_numbers

FRAMES = 512  # of a clip, at most: ten seconds for the wav2vec 2.0 family


def sound(wants: Wants) -> Batch:
    """Return clips for a speech model; nothing for any other model, or where the sizes are unknown."""
    accepted, config = wants.accepted, wants.config
    audio = first_of(config, "audio_config", "encoder_config", default=config)
    frames = max(8, min(FRAMES, wants.tokens))
    batch: Batch = {}
    if "input_values" in accepted:
        if hasattr(audio, "conv_stride"):
            batch["input_values"] = torch.zeros(wants.rows, frames * prod(audio.conv_stride) + 400)
        elif hasattr(audio, "max_length") and hasattr(audio, "num_mel_bins"):  # the audio spectrogram transformer
            batch["input_values"] = torch.zeros(wants.rows, audio.max_length, audio.num_mel_bins)
    if "input_features" in accepted:
        spectra = _spectra(wants, audio, frames)
        if spectra is not None:
            batch["input_features"] = spectra
            batch |= _masks(wants, spectra)
    return batch


def _spectra(wants: Wants, audio: Any, frames: int) -> torch.Tensor | None:
    bins = first_of(audio, "num_mel_bins", "input_feat_size", "mel_bins")
    positions = first_of(audio, "max_source_positions")
    if bins is not None and positions is not None and not hasattr(audio, "input_feat_per_channel"):
        return torch.zeros(wants.rows, bins, 2 * positions)  # Whisper's encoder takes clips of one length
    if hasattr(audio, "input_feat_per_channel"):
        return torch.zeros(wants.rows, frames, audio.input_feat_per_channel * getattr(audio, "input_channels", 1))
    width = first_of(audio, "feature_projection_input_dim", default=bins)
    return None if width is None else torch.zeros(wants.rows, frames, width)


def _masks(wants: Wants, spectra: torch.Tensor) -> Batch:
    masks: Batch = {}
    if "feature_attention_mask" in wants.accepted:
        masks["feature_attention_mask"] = whole_numbers(wants.rows, spectra.shape[-1], value=1)
    if "input_features_mask" in wants.accepted:
        masks["input_features_mask"] = torch.ones(spectra.shape[:2], dtype=torch.bool)
    return masks
