"""Blocks: everything in a model has exactly one, in the order of the forward pass."""

import pytest
import torch
from accelerate.utils import check_device_map

from balance_shim.memory.blocks import chain, within
from balance_shim.memory.ties import tied_groups
from tests import models


@pytest.mark.parametrize("name", models.ALL)
def test_each_tensor_has_exactly_one_block(name):
    """Every parameter and buffer, non-persistent ones included, belongs to one block and no more."""
    model = models.ALL[name]()
    covered = [tensor for block in chain(model) for tensor in block.tensors]
    parameters = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [key for key, _ in model.named_buffers(remove_duplicate=False)]
    assert sorted(covered) == sorted(parameters + buffers)


@pytest.mark.parametrize("by_list", [False, True], ids=["declared", "listed"])
def test_layers_that_a_model_lists_several_times_are_there_under_each_name(by_list):
    """A layer that runs several times has a device under each of its names, as accelerate asks of a map."""
    model = models.llama()
    first, second = model.model.layers[:2]
    model.model.layers = torch.nn.ModuleList([first, second, first, second])
    no_split = () if by_list else None
    covered = [tensor for block in chain(model, no_split) for tensor in block.tensors]
    names = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    assert sorted(covered) == sorted(names)
    check_device_map(model, dict.fromkeys((block.name for block in chain(model, no_split)), 0))


@pytest.mark.parametrize("name", models.ALL)
def test_declared_layers_stay_whole(name):
    """A module that the model declares unsplittable is one block, or lies within one."""
    model = models.ALL[name]()
    blocks = [block.name for block in chain(model)]
    for layer, module in model.named_modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            assert any(within(layer, block) for block in blocks), layer


def test_roles_of_a_language_model():
    """Embedding, layers and head are told apart."""
    roles = {block.name: block.role for block in chain(models.llama())}
    assert roles["model.embed_tokens"] == "embedding"
    assert roles["model.layers.3"] == "layer"
    assert roles["lm_head"] == "head"
    assert roles["model.norm"] == "other"


@pytest.mark.parametrize("name", sorted({"qwen-vl", "llava"} & set(models.ALL)))
def test_vision_blocks_belong_to_a_tower(name):
    """What stands outside of the language model and holds layers is a tower; the language model is not."""
    model = models.ALL[name]()
    roles = {block.name: block.role for block in chain(model)}
    towers = {key for key, role in roles.items() if role == "tower"}
    assert towers and all("vision" in key or "visual" in key for key in towers)
    assert sum(role == "layer" for role in roles.values()) == models.SIZES["num_hidden_layers"]


def test_a_tower_declared_whole_is_one_block():
    """InternVL's remote class declares its whole tower unsplittable: one block to place."""
    tower = [block for block in chain(models.internvl_remote()) if block.role == "tower"]
    assert [block.name for block in tower] == ["vision_model"]
    assert "vision_model.position" in tower[0].parameters


def test_without_declared_layers_module_lists_are_split():
    """A model that declares nothing is cut at the members of its module lists."""
    names = [block.name for block in chain(models.llama(), no_split=())]
    assert "model.layers.5" in names and "model.layers.5.mlp" not in names


def test_ties_are_found_before_they_are_tied():
    """A tied head is known as such on the meta device, an untied one is not."""
    tied = tied_groups(models.llama(tie_word_embeddings=True))
    assert {"model.embed_tokens.weight", "lm_head.weight"} in [set(group) for group in tied]
    assert tied_groups(models.llama()) == ()


def test_what_a_class_declares_inside_of_a_layer_keeps_the_layer_whole():
    """Idefics3 and others declare the attention of their tower, whose output its layer adds to its own input."""
    model = models.llama()
    names = [block.name for block in chain(model, {"LlamaDecoderLayer"})]
    assert [block.name for block in chain(model, {"LlamaAttention"})] == names


def test_members_of_a_sequence_of_like_modules_are_layers():
    """Where a model declares nothing and has no module lists, layers in `nn.Sequential` are still layers."""

    def layer():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())

    model = torch.nn.Module()
    model.h = torch.nn.Sequential(*(layer() for _ in range(6)))
    model.head = torch.nn.Linear(4, 2)
    assert [block.name for block in chain(model)] == [*(f"h.{number}" for number in range(6)), "head"]


def test_a_parametrized_weight_does_not_make_layers():
    """A convolution under weight norm, as in Wav2Vec2 and its like, stays one block beside the layers of the model."""
    from torch import nn

    model = nn.Module()
    model.positions = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
    model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    assert [block.name for block in chain(model)] == ["positions", "layers.0", "layers.1"]


def test_a_list_of_embeddings_does_not_make_layers():
    """The embeddings per depth of a path that MarkupLM concatenates are part of its embeddings, and no layers."""
    from torch import nn

    model = nn.Module()
    model.embeddings = nn.Module()
    model.embeddings.per_depth = nn.ModuleList(nn.Embedding(8, 8) for _ in range(3))
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    assert [block.name for block in chain(model)] == ["embeddings", "layers.0", "layers.1"]
