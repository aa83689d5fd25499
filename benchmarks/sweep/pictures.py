"""Words, pictures and videos, in the forms that processors make of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .fields import lookup
from .targets import Example, vocabulary_of

DEBUG = False


@dataclass(frozen=True)
class Inputs:
    """Makes the inputs of one example; `makes` names the chief ones, `joined` those that a batch concatenates."""

    example: Callable[[torch.Generator], Example]
    makes: tuple[str, ...]
    joined: frozenset[str] = frozenset()


def text_inputs(model: Any, task: str, parameters: set[str], length: int) -> Iterator[Inputs]:
    """Yield sequences of tokens, with the boxes, entities or pictures of documents that the class takes as well."""
    config = model.config
    choices = task == "multiple-choice"

    def plain(generator: torch.Generator) -> Example:
        shape = (2, length) if choices else (length,)
        ids = torch.randint(8, vocabulary_of(model), shape, generator=generator)
        example: Example = {"input_ids": ids}
        if "visual_feats" in parameters:  # LXMERT: objects in a picture
            example["visual_feats"] = torch.randn(4, config.visual_feat_dim, generator=generator)
            example["visual_pos"] = torch.rand(4, 4, generator=generator)
        if "attention_mask" in parameters:
            example["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if "bbox" in parameters:
            example["bbox"] = torch.tensor([100, 100, 200, 200]).expand(*shape, 4).clone()
        if "token_type_ids" in parameters and "mm_token_type_ids" not in parameters:
            example["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
        return example

    def end_marked(generator: torch.Generator) -> Example:
        example = plain(generator)
        example["input_ids"][..., -1] = getattr(config, "eos_token_id", None) or 2
        if "token_type_ids" in parameters:
            example.pop("token_type_ids", None)
        return example

    def separated(generator: torch.Generator) -> Example:
        example = plain(generator)
        example["input_ids"][..., [4, 5, -1]] = config.sep_token_id
        return example

    def with_page(generator: torch.Generator) -> Example:
        size = _size(config)
        return {**plain(generator), "pixel_values": torch.randn(3, size, size, generator=generator)}

    def aligned(generator: torch.Generator) -> Example:
        return {name: torch.cat([value] * 3, 0)[:64] for name, value in plain(generator).items()}

    if "input_ids" not in parameters and "inputs" not in parameters:
        return
    if "inputs" in parameters and "input_ids" not in parameters:
        yield Inputs(lambda generator: {"inputs": plain(generator)["input_ids"]}, ("inputs",))
        return
    if "bbox" in parameters and "pixel_values" in parameters:
        yield Inputs(with_page, ("input_ids", "bbox", "pixel_values"))
    yield Inputs(plain, ("input_ids",))
    yield Inputs(end_marked, ("input_ids",))
    if isinstance(getattr(config, "sep_token_id", None), int):
        yield Inputs(separated, ("input_ids",))
    if not choices:
        yield Inputs(aligned, ("input_ids",))


def alone(model: Any, parameters: set[str]) -> Iterator[Inputs]:
    """Yield pictures without words."""
    name = "pixel_values" if "pixel_values" in parameters else "inputs" if "inputs" in parameters else ""
    if not name:
        return
    config = model.config
    channels = lookup(config, "num_channels", "in_channels", default=3)
    channels = channels if isinstance(channels, int) and channels <= 4 else 3
    if "spatial_shapes" in parameters:  # SigLIP 2: patches of pictures of any shape
        yield Inputs(
            lambda generator: {
                name: torch.randn(16, channels * config.vision_config.patch_size**2, generator=generator),
                "pixel_attention_mask": torch.ones(16, dtype=torch.long),
                "spatial_shapes": torch.tensor([4, 4]),
            },
            (name, "spatial_shapes"),
        )
    for size in dict.fromkeys((_size(config), 32, 64, 224)):

        def example(generator: torch.Generator, size: int = size) -> Example:
            inputs: Example = {name: torch.randn(channels, size, size, generator=generator)}
            if "pixel_mask" in parameters:
                inputs["pixel_mask"] = torch.ones(size, size, dtype=torch.long)
            if "prompt_depth" in parameters:
                inputs["prompt_depth"] = torch.rand(1, size // 2, size // 2, generator=generator)
            return inputs

        yield Inputs(example, (name,))


def videos(model: Any, parameters: set[str]) -> Iterator[Inputs]:
    """Yield videos."""
    config, size = model.config, _size(model.config)
    name = "pixel_values_videos" if "pixel_values_videos" in parameters else "pixel_values"
    frames = lookup(config, "num_frames", "frames_per_clip", default=4)
    yield Inputs(lambda generator: {name: torch.randn(frames, 3, size, size, generator=generator)}, (name,))


def with_words(model: Any, parameters: set[str], length: int) -> Iterator[Inputs]:
    """Yield pictures with words around them, in every form that the class's parameters allow."""
    from .picture_forms import forms

    config = model.config
    token = lookup(
        config, "image_token_id", "image_token_index", "media_placeholder_token_id", "im_patch_id", "image_patch_id",
        "placeholder_token_id", "image_soft_token_id",
    )  # fmt: skip
    for form in forms(config, parameters):

        def example_of(places: int, form: Any = form):
            def example(generator: torch.Generator) -> Example:
                ids = torch.randint(8, 200, (length,), generator=generator)
                marks = torch.full((places,), token if token is not None else 9)
                ids = torch.cat([ids[:4], marks, ids[4:]])
                inputs = {**form.picture(generator), **form.extra(ids)}
                if "input_ids" in parameters:
                    inputs = {"input_ids": ids, **inputs}
                    ids = inputs["input_ids"]
                if "attention_mask" in parameters and "input_ids" in parameters:
                    inputs["attention_mask"] = torch.ones(len(ids), dtype=torch.long)
                if "mm_token_type_ids" in parameters:
                    inputs["mm_token_type_ids"] = ids.eq(-1 if token is None else token).long()
                elif "token_type_ids" in parameters and "bbox" not in parameters:
                    inputs["token_type_ids"] = ids.eq(-1 if token is None else token).long()
                return inputs

            return example

        makes = ("input_ids", *form.makes) if "input_ids" in parameters else form.makes
        if token is None or "input_ids" not in parameters:
            yield Inputs(example_of(0), makes, form.joined)
        else:
            yield from counted(model, example_of, makes, form.joined)


def counted(
    model: Any,
    example_of: Callable[[int], Callable[[torch.Generator], Example]],
    makes: tuple[str, ...],
    joined: frozenset[str],
) -> Iterator[Inputs]:
    """Yield the inputs with as many places as the model has features: it says so when the number is wrong."""
    from .batches import collate

    tried: set[int] = set()
    likely = lookup(model.config, "num_query_tokens", "image_seq_length", "mm_tokens_per_image", "num_image_tokens")
    waiting = [*([likely] if isinstance(likely, int) and likely <= 4096 else []), 7, 16, 4, 1, 0]
    while waiting and len(tried) < 9:
        places = waiting.pop(0)
        if places in tried:
            continue
        tried.add(places)
        example = example_of(places)
        try:
            with torch.no_grad():
                model(**collate([example(torch.Generator().manual_seed(0))], joined))
        except Exception as error:
            if DEBUG:
                print("   ", places, type(error).__name__, str(error)[:300])
            numbers = [int(digits) for digits in re.findall(r"\d+", str(error)[:400])]
            near = [number for number in numbers if 0 < number <= 4096]
            if re.search(r"do(es)? not match|mismatch|must match|tokens", str(error)):
                hidden = lookup(model.config, "hidden_size", inside="text", default=64)
                exact = [number // hidden for number in numbers if number % hidden == 0 and number >= hidden]
                waiting = [number for number in dict.fromkeys(exact + near) if number not in tried] + waiting
            elif len(tried) > 1:
                return  # it is not the number of places that is wrong
            continue
        yield Inputs(example, makes, joined)
        return


def _size(config: Any) -> int:
    size = lookup(config, "image_size", inside="vision", default=32)
    while isinstance(size, list | tuple):
        size = size[0]
    if isinstance(size, dict):
        size = next(iter(size.values()))
    return int(size) if isinstance(size, int) else 32
