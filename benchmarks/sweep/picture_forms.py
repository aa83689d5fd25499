"""The forms in which processors hand pictures to models that also read words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .fields import lookup
from .targets import Example


@dataclass(frozen=True)
class Form:
    """One form: `picture` makes the entries of one picture, `extra` those that depend on the tokens."""

    picture: Callable[[torch.Generator], Example]
    makes: tuple[str, ...]
    joined: frozenset[str] = frozenset()
    extra: Callable[[torch.Tensor], Example] = lambda ids: {}


def forms(config: Any, parameters: set[str]) -> Iterator[Form]:
    """Yield the forms that the parameters of `forward` allow, the most particular first."""
    from .pictures import _size

    size = _size(config)
    patch = lookup(config, "patch_size", inside="vision", default=16)
    patch = patch if isinstance(patch, int) else patch[0]
    merge = lookup(config, "spatial_merge_size", "merge_size", "merge_kernel_size", inside="vision", default=2)
    merge = merge if isinstance(merge, int) else merge[0]
    names = [name for name in ("pixel_values", "flattened_patches", "image_patches", "images") if name in parameters]
    if not names:
        return
    name = names[0]
    grids = [grid for grid in ("image_grid_thw", "image_grid_hws", "grid_thws", "image_grid_hw") if grid in parameters]
    if grids:
        yield from _patches(config, name, grids[0], patch, merge)
    if "aspect_ratio_ids" in parameters:
        yield _mllama(config, size)
    if "flattened_patches" in parameters:
        width = lookup(config, "patch_embed_hidden_size", default=768)
        yield Form(lambda g: {name: torch.cat([torch.ones(16, 2), torch.randn(16, width, generator=g)], 1)}, (name,))

    def extras(tiles: int) -> Example:
        inputs: Example = {}
        if "image_sizes" in parameters:
            inputs["image_sizes"] = torch.tensor([size, size])
        if "pixel_attention_mask" in parameters:
            inputs["pixel_attention_mask"] = torch.ones(tiles, size, size, dtype=torch.long)
        return inputs

    def picture(*shape: int, **more: Any) -> Callable[[torch.Generator], Example]:
        return lambda generator: {name: torch.randn(shape, generator=generator), **more}

    if "image_attention_mask" in parameters:
        yield Form(picture(1, 3, size, size), (name,), extra=_one_picture("image_attention_mask"))
    if "image_embeds_position_mask" in parameters:
        yield Form(picture(3, size, size), (name,), extra=_positions_of_features(config))
    if "image_sizes" in parameters:
        for tiles in (3, 2, 5):
            yield Form(picture(tiles, 3, size, size, image_sizes=torch.tensor([size, size])), (name, "image_sizes"))
        yield Form(picture(3, size, size, image_sizes=torch.tensor([size, size])), (name, "image_sizes"))
    if "pixel_attention_mask" in parameters:
        yield Form(picture(1, 3, size, size, **extras(1)), (name, "pixel_attention_mask"))
    if "qformer_input_ids" in parameters:
        for shape in ((3, size, size), (4, 3, size, size)):  # a picture, or a video
            yield Form(
                picture(*shape), (name,),
                extra=lambda ids: {
                    "qformer_input_ids": torch.randint(8, 200, (8,)), "qformer_attention_mask": torch.ones(8).long()
                },
            )  # fmt: skip
    if "high_res_pixel_values" in parameters:
        yield Form(picture(3, size, size, high_res_pixel_values=torch.randn(3, 2 * size, 2 * size)), (name,))
    yield Form(picture(3, size, size), (name,))
    for side in (32, 64, 224, 384):
        if side != size:
            yield Form(picture(3, side, side), (name,))
    yield Form(picture(1, 3, size, size), (name,))
    yield Form(picture(2, 3, size, size), (name,))


def _patches(config: Any, name: str, grid: str, patch: int, merge: int) -> Iterator[Form]:
    """Pictures as rows of patches, in pixels of all frames or as small pictures, with the grid that they make."""
    channels = lookup(config, "in_channels", "num_channels", inside="vision", default=3)
    frames = lookup(config, "temporal_patch_size", inside="vision", default=1)
    side = 2 * merge
    cells = (
        torch.tensor([1, side, side])
        if grid != "image_grid_hws" and grid != "image_grid_hw"
        else torch.tensor([side, side])
    )
    joined = frozenset({name, grid})
    for shape in (
        (side * side, channels * frames * patch * patch),
        (side * side, channels * patch * patch),
        (side * side, channels, patch, patch),
    ):
        yield Form(
            lambda generator, shape=shape: {name: torch.randn(shape, generator=generator), grid: cells[None].clone()},
            (name, grid),
            joined,
        )


def _one_picture(name: str) -> Callable[[torch.Tensor], Example]:
    return lambda ids: {name: torch.ones(len(ids), 1, dtype=torch.long)}


def _positions_of_features(config: Any) -> Callable[[torch.Tensor], Example]:
    number = lookup(config, "latent_query_num", default=64)

    def extra(ids: torch.Tensor) -> Example:
        filled = torch.cat([ids[:1], torch.full((number,), 9), ids[1:]])
        mask = torch.zeros(len(filled), dtype=torch.bool)
        mask[1 : 1 + number] = True
        return {"input_ids": filled, "image_embeds_position_mask": mask}

    return extra


def _mllama(config: Any, size: int) -> Form:
    tiles = lookup(config, "max_num_tiles", inside="vision", default=4)

    def picture(generator: torch.Generator) -> Example:
        return {
            "pixel_values": torch.randn(1, tiles, 3, size, size, generator=generator),
            "aspect_ratio_ids": torch.tensor([1]),
            "aspect_ratio_mask": torch.ones(1, tiles, dtype=torch.long),
        }

    def extra(ids: torch.Tensor) -> Example:
        return {"cross_attention_mask": torch.ones(len(ids), 1, tiles, dtype=torch.long)}

    return Form(picture, ("pixel_values", "aspect_ratio_ids"), extra=extra)
