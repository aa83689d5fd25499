"""A step that stops across devices is undone, the map repaired, the step repeated; outputs come back to the inputs."""

from pathlib import Path

import pytest

from balance_shim.training import crossing
from tests import models
from tests.seams.cases import results_of

REPAIRED = ["late", "accumulation", "portions", "own loss", "own loss with LoRA"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What repair_cases.py wrote."""
    folder = tmp_path_factory.mktemp("repair")
    cases = Path(__file__).with_name("repair_cases.py")
    more = {"BALANCE_SIMULATE": "4x64MiB", "OMP_NUM_THREADS": "1"}
    return results_of(cases, models.saved_llama(folder / "model"), folder, **more)


def lines(case):
    return [line for line in case["log"] if "met on different devices" in line]


@pytest.mark.parametrize("name", REPAIRED)
def test_a_step_that_stops_is_repeated_with_the_losses_of_one_device(results, name):
    """One line, no error, and neither loss nor gradient of the repeated step differs from those of one device."""
    case, one = results[name], results[f"{name}, one device"]
    assert "error" not in case, case["traceback"]
    assert len(lines(case)) == 1 and "the step is repeated" in lines(case)[0]
    assert case["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert case["norms"] == pytest.approx(one["norms"], rel=1e-2)


def test_what_met_is_together_afterwards(results):
    """The blocks whose tensors met are on one device, and the others are spread as before."""
    case = results["late"]
    before, after = case["first map"], case["map"]
    assert before["model.embed_tokens"] != before["model.norm"]
    assert after["model.embed_tokens"] == after["model.norm"]
    assert len(set(after.values())) == 4


def test_the_plan_in_the_report_is_the_repaired_one(results):
    """plan.json has the map in force, and notes what met."""
    case = results["late"]
    assert case["plan"]["device_map"] == case["map"]
    assert any("met on different devices" in note for note in case["plan"]["notes"])


def test_the_next_run_starts_with_what_this_one_has_shown(results):
    """The disk cache has the colocation, so that the next run of the same model repairs nothing."""
    again = results["late, again"]
    assert not lines(again)
    assert again["first map"]["model.embed_tokens"] == again["first map"]["model.norm"]
    assert again["losses"] == pytest.approx(results["late, one device"]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", ["plain output", "library's output"])
def test_outputs_come_back_whoever_replaced_forward(results, name):
    """Per-token quantities in nested structures are where the inputs were, without any repair."""
    assert "error" not in results[name], results[name]["traceback"]
    assert not lines(results[name])
    assert results[name]["losses"] == pytest.approx(results[f"{name}, one device"]["losses"], rel=1e-4)


def test_what_no_map_of_several_devices_holds_goes_to_one_that_has_room(results):
    """After the library's own map, which stops as well, all of the model is on the first device."""
    case = results["all layers"]
    assert "error" not in case, case["traceback"]
    assert "the library's own map is in force now" in lines(case)[-2]
    assert "all of it is on npu:0 now" in lines(case)[-1] and set(case["map"].values()) == {0}
    assert case["losses"] == pytest.approx(results["all layers, one device"]["losses"], rel=1e-4)


def test_a_users_map_is_not_changed(results):
    """The program's own error comes through, after one line."""
    case = results["user's map"]
    assert "found at least two devices" in case["error"]
    assert len(lines(case)) == 1 and "not changed" in lines(case)[0]


def test_a_tensor_on_the_host_is_the_scripts_own_mistake(results):
    """No block moves for it, and the error is the original one."""
    assert "and cpu!" in results["host"]["error"]
    assert not lines(results["host"])


def test_an_explicit_map_is_no_missing_map(results):
    """Nobody is told that a model with `device_map={"": 0}` had none."""
    case = results["explicit"]
    assert "error" not in case
    assert not [line for line in case["log"] if "device_map" in line or "BALANCE_INTERCEPT" in line]


@pytest.mark.parametrize(
    "message",
    [
        "Expected all tensors to be on the same device, but found at least two devices, cuda:3 and cuda:0!",
        "Expected all tensors to be on the same device, but got mat1 is on cuda:1, different from other tensors on "
        "cuda:0 (when checking argument in method wrapper_CUDA_addmm)",
        "indices should be either on cpu or on the same device as the indexed tensor (cuda:1)",
        "torch.cat(): all input tensors must be on the same device. Received cuda:0 and cuda:1",
        "Function AddBackward0 returned an invalid gradient at index 1 - expected device cuda:0 but got cuda:1",
    ],
)
def test_cross_device_errors_are_known_in_all_their_words(message):
    """The kernels, indexing, concatenation and autograd word it differently."""
    assert crossing.is_cross_device(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "mat1 and mat2 shapes cannot be multiplied (4x8 and 16x4)",
    ],
)
def test_other_errors_are_left_alone(message):
    """No map mends a tensor that was left on the host, or what has nothing to do with devices."""
    assert not crossing.is_cross_device(RuntimeError(message))
