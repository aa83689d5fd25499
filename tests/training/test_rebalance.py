"""`BALANCE_REBALANCE=1` on simulated devices: a wrong plan is put right between steps, and nothing else changes."""

from pathlib import Path

import pytest
import torch
import transformers

from tests import models
from tests.seams.cases import results_of

WRONG = ["fused", "foreach", "LoRA", "accumulation", "bf16", "own optimizer", "hungry layers"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What rebalance_cases.py wrote.

    Short rows want the head with a layer, as it is about three of them by its weights; long ones want it alone.
    """
    folder = tmp_path_factory.mktemp("rebalance")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**models.SIZES, "vocab_size": 2048}, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    cases = Path(__file__).with_name("rebalance_cases.py")
    more = {"BALANCE_SIMULATE": "3x64MiB", "OMP_NUM_THREADS": "1"}
    outcomes = results_of(cases, folder / "model", folder, **more)
    assert not {name: case["failed"] for name, case in outcomes.items() if "failed" in case}
    return outcomes


def lines(case, *phrases):
    return [line for line in case["log"] if all(phrase in line for phrase in phrases)]


@pytest.mark.parametrize("name", WRONG)
def test_blocks_move_and_the_worst_peak_falls(results, name):
    """Rows are longer than planned for, or layers keep more: the worst measured peak falls by what makes it pay."""
    moved, stayed = results[name], results[f"{name}, off"]
    assert moved["moved"] and not stayed["moved"]
    assert max(moved["peaks"]) < 0.95 * max(stayed["peaks"])
    assert lines(moved, "moved", "blocks", "measured peaks of steps 2 to 3")


@pytest.mark.parametrize("name", WRONG)
def test_losses_are_the_same(results, name):
    """Moving between steps changes no loss, before or after; but dropout draws other masks on another device."""
    moved, stayed = results[name]["losses"], results[f"{name}, off"]["losses"]
    assert len(moved) == 7 and moved[:3] == pytest.approx(stayed[:3], rel=1e-5)
    assert moved == pytest.approx(stayed, rel=1e-3 if name == "LoRA" else 1e-5)


@pytest.mark.parametrize("name", ["fused", "foreach", "LoRA", "accumulation"])
def test_optimizer_state_is_where_its_parameters_are(results, name):
    """Both moments of each trained parameter are on its device."""
    case = results[name]
    assert case["moments"] == case["trained"] > 0 and not case["astray"]


def test_fused_and_foreach_keep_their_counts_of_steps_where_they_want_them(results):
    """A move changes no place of the counts: fused wants them on the device."""
    for name in ("fused", "foreach"):
        assert results[name]["steps on"] == results[f"{name}, off"]["steps on"]


@pytest.mark.parametrize("name", ["fused", "LoRA"])
def test_the_report_has_the_map_in_force(results, name):
    """plan.json and device_map.json are those of the map that training ended with, and say what they rest on."""
    case = results[name]
    assert case["plan"]["device_map"] == case["map"] == case["written"]
    assert "measured in steps" in case["plan"]["method"]
    assert case["plan"]["workload"]["seq_len"] == 256


def test_the_new_prediction_is_close(results):
    """What is predicted with the measured figures is measured afterwards, within a tenth."""
    for name in ("fused", "foreach", "LoRA"):
        predicted = max(device["predicted_peak"] for device in results[name]["plan"]["devices"])
        assert max(results[name]["peaks"]) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("name", ["as planned", "as seen", "short rows of a long plan"])
def test_nothing_happens_when_the_prediction_was_right(results, name):
    """Said by the user or seen in the data; short rows are no reason to give up room for long ones that are to come."""
    assert not results[name]["moved"] and not lines(results[name], "moved", "measured")


def test_measuring_waits_for_rows_as_long_as_planned_for(results):
    """Steps 2 and 3 have rows of half the tokens, which say nothing; step 4 has long ones."""
    case = results["long rows come late"]
    assert case["moved"] and lines(case, "measured peaks of steps 2 to 4")


def test_other_modes_are_left_alone(results):
    """A map of the user's stays as it is, which is said."""
    assert not results["map"]["moved"] and lines(results["map"], "BALANCE_REBALANCE=1 applies to maps made by the shim")


def test_a_watched_training_moves_alike(results):
    """The monitor resets peaks, too: both see the same."""
    assert results["monitored"]["map"] == results["fused"]["map"]
    assert results["monitored"]["losses"] == pytest.approx(results["fused"]["losses"], rel=1e-6)


def test_chosen_checkpointing_stays_as_it_is(results):
    """Layers that are recomputed were chosen before training, and moving changes no loss of theirs."""
    assert results["checkpointing chosen"]["moved"]
    assert results["checkpointing chosen"]["losses"] == pytest.approx(results["fused"]["losses"], rel=1e-5)


@pytest.mark.parametrize(("name", "phrase"), [("move fails", "planted"), ("plan fails", "re-balancing failed")])
def test_a_failure_leaves_the_training_as_it_was(results, name, phrase):
    """One warning; the map and the losses are those without the variable."""
    case, plain = results[name], results["fused, off"]
    assert len(lines(case, "warning", phrase)) == 1
    assert not case["moved"] and case["map"] == plain["map"]
    assert case["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_nothing_is_left_in_the_trainer(results):
    """The callback goes when training ends, also of one that was not needed or has failed."""
    assert all(results[name]["callbacks left"] for name in (*WRONG, "as planned", "map", "move fails", "plan fails"))
