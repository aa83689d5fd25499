"""Modules of the script's own around a placed model train with the losses of one device, and so do evaluations."""

from pathlib import Path

import pytest

from tests import models
from tests.seams.cases import results_of

AROUND = ["own_head", "own_head_with_map", "own_prompt", "prompt_tuning", "modules_to_save", "valued"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What outside_cases.py wrote."""
    folder = tmp_path_factory.mktemp("outside")
    cases = Path(__file__).with_name("outside_cases.py")
    more = {"BALANCE_SIMULATE": "4x64MiB", "OMP_NUM_THREADS": "1"}
    return results_of(cases, models.saved_llama(folder / "model", vocab_size=4096), folder, **more)


def case_of(results, name):
    assert "error" not in results[name], results[name]["traceback"]
    return results[name]


@pytest.mark.parametrize("name", [*(f"{name}, small first" for name in AROUND), "own_head, alike"])
def test_modules_made_at_the_models_device(results, name):
    """Heads, prompts and copies to be saved are where they are needed; the model stays on several devices."""
    case = case_of(results, name)
    assert len(case["devices"]) > 2
    assert case["losses"] == pytest.approx(results[f"{name.split(',')[0]}, one device"]["losses"], rel=1e-3)


def test_a_head_made_where_the_embedding_is_comes_to_the_first_device(results):
    """A wrapper with a map of its own is left by the Trainer as it is, so its head is moved where outputs return."""
    case = case_of(results, "own_head_with_map, small first")
    assert case["first map"]["embed_tokens"] != 0 and case["outside"] == ["npu:0"]
    assert "made where the embedding is moved to npu:0" in case["log"]
    assert "met on different devices" not in case["log"]


def test_the_map_of_a_model_in_a_wrapper_without_one_holds(results):
    """The Trainer does not bring all of it to the first device, and a line says so."""
    case = case_of(results, "own_head, alike")
    assert len(case["devices"]) == 4 and case["outside"] == ["npu:0"]
    assert "OwnHead has no device map of its own" in case["log"]


@pytest.mark.parametrize("name", ["new_head", "adapted", "reordered"])
def test_modules_that_were_put_into_a_placed_model(results, name):
    """A head made on the host, adapters made at the model's device, layers in another order: nothing is repaired."""
    case = case_of(results, name)
    assert len(case["devices"]) == 4 and "met on different devices" not in case["log"]
    assert case["losses"] == pytest.approx(results[f"{name}, one device"]["losses"], rel=1e-3)


def test_the_map_has_the_layers_that_the_model_has_now(results):
    """Layers that were copied, left out and put in another order are in the map by their new names, where they are."""
    case = case_of(results, "reordered")
    layers = {name: place for name, place in case["map"].items() if name.startswith("model.layers.")}
    assert list(layers) == [f"model.layers.{number}" for number in range(5)]
    assert [f"npu:{place}" for place in layers.values()] == case["layers"]


def test_prompts_follow_the_embedding(results):
    """When the embedding moves between two steps, PEFT's prompt encoder and its optimizer state move along."""
    case = case_of(results, "prompt_tuning, moved")
    assert case["map"]["model.embed_tokens"] == 2 and case["outside"] == ["npu:2"]
    assert case["losses"] == pytest.approx(results["prompt_tuning, one device"]["losses"], rel=1e-3)
    assert "met on different devices" not in case["log"]


def test_a_kernel_of_head_and_loss_has_norm_and_head_on_one_device(results):
    """Where Liger's forward is bound after loading, blocks move although that fills no device less."""
    case = case_of(results, "fused")
    assert case["first map"]["model.norm"] != case["first map"]["lm_head"]
    assert case["map"]["model.norm"] == case["map"]["lm_head"] and len(set(case["map"].values())) > 1
    assert case["losses"] == pytest.approx(results["fused, one device"]["losses"], rel=1e-3)


@pytest.mark.parametrize("name", ["evaluated in training", "evaluated alone"])
def test_an_evaluation_that_stops_is_repaired(results, name):
    """Its step is repeated on another map, with the losses of one device; the trainer's method is its own again."""
    case, one = case_of(results, name), results[f"{name}, one device"]
    assert case["log"].count("met on different devices in an evaluation") >= 1
    assert case["log"].count("and the step is repeated; nothing is lost") == 1
    assert case["evaluated"] == pytest.approx(one["evaluated"], rel=1e-3)
    assert case["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert case["restored"] and len(case["devices"]) > 2
