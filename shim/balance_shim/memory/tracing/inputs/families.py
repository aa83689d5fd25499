"""Pictures and videos in the layouts of single families, as their processors return them, by names in `forward`."""

from typing import Any

import torch

from ..errors import CannotTrace
from .pictures import CHANNELS, vision_config
from .wants import Batch, Wants, first_of, pair, whole_numbers

QUESTION_TOKENS = 8  # of the question that a Q-Former reads along with a picture
FRAMES = 8  # of a video, where the config has no number
MOST_PATCHES = 2048  # of a picture that comes as patches: the default of processors


def of_family(wants: Wants, batch: Batch) -> Batch:
    """Return `batch`, of tokens and of pictures as most models take them, with all that single families take.

    Raises:
        CannotTrace: the sequences are too short for a picture.
    """
    for accepted, make in _FAMILIES:
        if accepted <= wants.accepted:
            batch = make(wants, batch)
    return batch


def _with_position_mask(wants: Wants, batch: Batch) -> Batch:
    """Kosmos-2 and 2.5: a mask marks the tokens that a picture replaces."""
    features = first_of(wants.config, "latent_query_num")
    ids = batch.get("input_ids")
    if ids is None or features is None:
        return batch
    if features + 2 > ids.shape[1]:
        raise CannotTrace(f"{features} features of a picture leave no room in {ids.shape[1]} tokens")
    mask = torch.zeros_like(ids)
    mask[:, 1 : 1 + features] = 1
    return {**batch, "image_embeds_position_mask": mask}


def _as_flattened_patches(wants: Wants, batch: Batch) -> Batch:
    """Kosmos-2.5 and Pix2Struct: each patch behind its place in the picture."""
    vision = vision_config(wants)
    width = first_of(vision, "patch_embed_hidden_size")
    if width is None:
        return batch
    patches = min(MOST_PATCHES, first_of(vision, "seq_len", "max_num_patches", default=MOST_PATCHES))
    return {**batch, "flattened_patches": torch.ones(wants.rows, patches, 2 + width)}


def _as_embedded_patches(wants: Wants, batch: Batch) -> Batch:
    """Fuyu: patches go into the language model by a linear map; 4.x has their places in a tensor of its own."""
    config, ids = wants.config, batch.get("input_ids")
    if ids is None:
        return batch
    patch, patches = pair(config.patch_size)[0], max(1, ids.shape[1] // 2)
    pixels = torch.zeros(wants.rows, patches, first_of(config, *CHANNELS, default=3) * patch**2)
    if "image_patches_indices" not in wants.accepted:
        return {**batch, "pixel_values": pixels}
    places = torch.full_like(ids, -1)
    places[:, :patches] = torch.arange(patches)
    return {**batch, "image_patches": pixels, "image_patches_indices": places}


def _with_question(wants: Wants, batch: Batch) -> Batch:
    """InstructBLIP: the Q-Former reads the question, too; of a video it sees several frames."""
    if "pixel_values" not in batch:
        return batch
    pixels = batch["pixel_values"]
    if "Video" in wants.kind:
        pixels = pixels[:, None].expand(-1, FRAMES, -1, -1, -1).contiguous()
    shape = (wants.rows, QUESTION_TOKENS)
    question = {name: whole_numbers(*shape, value=1) for name in ("qformer_input_ids", "qformer_attention_mask")}
    return {**batch, **question, "pixel_values": pixels}


def _in_high_resolution(wants: Wants, batch: Batch) -> Batch:
    """DeepSeek-VL's hybrid: a second tower sees the picture in another size."""
    high = first_of(wants.config, "high_res_vision_config")
    if "pixel_values" not in batch or first_of(high, "image_size") is None:
        return batch
    return {**batch, "high_res_pixel_values": torch.zeros(wants.rows, 3, *pair(high.image_size))}


def _as_crops(wants: Wants, batch: Batch) -> Batch:
    """Phi-4 multimodal: the whole picture and a crop of it, with masks of their patches."""
    vision, ids = vision_config(wants), batch.get("input_ids")
    crop, token = first_of(vision, "crop_size"), first_of(vision, "image_token_id")
    if ids is None or crop is None or token is None:
        return batch
    patches = crop // vision.patch_size
    side = (patches + 1) // 2  # two by two become one
    features = 2 * (side * side + side) + 1  # each row of both ends in a token of its own, and one is between them
    if features >= ids.shape[1]:
        raise CannotTrace(f"{features} features of a picture leave no room in {ids.shape[1]} tokens")
    ids = ids.clone()
    ids[:, :features] = token
    return {
        **batch,
        "input_ids": ids,
        "image_pixel_values": torch.zeros(wants.rows, 2, 3, crop, crop),
        "image_sizes": torch.tensor([[crop, crop]] * wants.rows),
        "image_attention_mask": whole_numbers(wants.rows, 2, patches, patches, value=1),
    }


def _as_video(wants: Wants, batch: Batch) -> Batch:
    """V-JEPA 2, which takes nothing else, and Video-LLaVA, which has a tower for them."""
    config: Any = wants.config
    own_tower = any(name.rpartition(".")[2] == "video_tower" for name, _ in wants.model.named_modules())
    if own_tower:
        config = vision_config(wants)
    elif "pixel_values" in wants.accepted or "input_ids" in wants.accepted:
        return batch  # the tower of pictures sees the frames of videos
    size = first_of(config, "crop_size", "image_size")
    if size is None:
        return batch
    frames = first_of(config, "frames_per_clip", "num_frames", default=FRAMES)
    channels = first_of(config, "in_chans", *CHANNELS, default=3)
    return {**batch, "pixel_values_videos": torch.zeros(wants.rows, frames, channels, *pair(size))}


# Parameters of `forward` -> the function that makes them.
_FAMILIES = (
    ({"image_embeds_position_mask"}, _with_position_mask),
    ({"flattened_patches"}, _as_flattened_patches),
    ({"image_patches"}, _as_embedded_patches),
    ({"qformer_input_ids"}, _with_question),
    ({"high_res_pixel_values"}, _in_high_resolution),
    ({"image_pixel_values", "image_attention_mask"}, _as_crops),
    ({"pixel_values_videos"}, _as_video),
)
