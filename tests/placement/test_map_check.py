"""A user's map against the real model: completed where that is safe, refused in one clear line otherwise."""

import pytest

from balance_shim.errors import DeviceMapError
from balance_shim.map_file import UserMap
from balance_shim.memory.structure import structure_of
from balance_shim.placement.map_check import fit
from balance_shim.placement.places import device_of
from tests import models

FULL = {
    "model.embed_tokens": 0,
    **{f"model.layers.{layer}": layer // 2 for layer in range(6)},
    "model.norm": 2,
    "model.rotary_emb": 0,
    "lm_head": 3,
}


def check(device_map, model=None, devices=4):
    model = model if model is not None else models.llama()
    return fit(UserMap(device_map, "map.json"), model, structure_of(model), devices)


def refused(device_map, model=None, devices=4):
    with pytest.raises(DeviceMapError) as caught:
        check(device_map, model, devices)
    message = str(caught.value)
    assert message.startswith("map.json: ") and "\n" not in message
    return message


def without(*names):
    return {name: device for name, device in FULL.items() if name not in names}


def test_a_complete_map_is_taken_as_it_is():
    """Nothing is added to a map that covers everything."""
    assert check(FULL) == (FULL, ())


@pytest.mark.parametrize(
    "device_map",
    [{"": 1}, {"model": 0, "lm_head": 1}, {"model.layers": 1, "": 0}, {**FULL, "model.layers.3.mlp": 1}],
)
def test_keys_at_any_depth(device_map):
    """The whole model, prefixes, and keys inside of a layer that agree with the layer."""
    completed, notes = check(device_map)
    assert completed == device_map and not notes


def test_forgotten_small_modules_are_completed_and_said():
    """A norm goes to the layer before it, rotary embeddings to the embedding, each with a line."""
    completed, notes = check(without("model.rotary_emb", "model.norm"))
    assert completed["model.rotary_emb"] == 0 and completed["model.norm"] == 2
    assert len(notes) == 2 and all(note.startswith("map.json: ") for note in notes)


def test_a_forgotten_tied_head_goes_to_the_embedding():
    """The head of a tied model has no bytes of its own."""
    completed, notes = check(without("lm_head"), models.llama(tie_word_embeddings=True))
    assert completed["lm_head"] == 0 and "tied" in notes[0]


def test_forgotten_layers_are_not_guessed():
    """Layers and an untied head are named, all of them."""
    message = refused(without("lm_head", "model.layers.0", "model.layers.1", "model.layers.2"))
    assert "no device for model.layers.0, model.layers.1, model.layers.2, lm_head of" in message


def test_unknown_names_come_with_the_nearest_real_ones():
    """A missing prefix and a misspelling are recognised."""
    message = refused({**without("model.layers.0", "lm_head"), "layers.0": 0, "lm_haed": 1})
    assert "'layers.0' (did you mean 'model.layers.0'?)" in message
    assert "'lm_haed' (did you mean 'lm_head'?)" in message


def test_many_unknown_names_stay_one_line():
    """A map for another model does not fill the screen."""
    message = refused({f"transformer.h.{layer}": 0 for layer in range(80)})
    assert "80 names not in LlamaForCausalLM" in message and "and 68 more" in message and len(message) < 500


def test_devices_that_do_not_exist():
    """The name, the device asked for, and how many there are."""
    assert "'lm_head' is mapped to device 3, but there are 3 devices (0 to 2)" in refused(FULL, devices=3)
    assert "there is no accelerator here" in refused({"": 0}, devices=0)


def test_a_layer_must_not_be_split():
    """Keys inside of a layer that disagree are refused with the key that would do."""
    message = refused({**FULL, "model.layers.1.mlp": 3})
    assert "model.layers.1 (LlamaDecoderLayer) must stay on one device" in message
    assert 'give "model.layers.1" one device' in message


def test_ties_must_not_be_split():
    """Tied weights on two devices are named with both."""
    message = refused(FULL, models.llama(tie_word_embeddings=True))
    assert "lm_head.weight on 3" in message and "model.embed_tokens.weight on 0" in message


def test_offloaded_modules_are_said(capsys):
    """cpu and disk are the user's right, and cannot be trained."""
    completed, _ = check({**FULL, "model.layers.5": "cpu"})
    assert completed["model.layers.5"] == "cpu" and "do not train" in capsys.readouterr().err


@pytest.mark.parametrize("name", models.ALL)
def test_an_embracing_key_covers_every_model(name):
    """One key for everything works for every kind of model."""
    model = models.ALL[name]()
    completed, _ = check({"": 0}, model)
    assert all(device_of(tensor, completed) == 0 for tensor, _ in model.named_parameters())


def test_named_tensors_become_their_module():
    """accelerate brings inputs to named modules only; a module whose tensors are on two devices is refused."""
    completed, _ = check({**without("model.norm"), "model.norm.weight": 2})
    assert completed["model.norm"] == 2 and "model.norm.weight" not in completed
    bert = {"bert": 0, "classifier": 1, "bert.pooler.dense.bias": 1}
    assert "bert.pooler.dense computes with all of its tensors" in refused(bert, models.bert_classifier())


def test_all_unknown_names_are_listed():
    message = refused({**FULL, **{f"nowhere.{number}": 0 for number in range(5)}})
    assert all(f"nowhere.{number}" in message for number in range(5))
