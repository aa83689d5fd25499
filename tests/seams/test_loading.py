"""Seam 1: which loads get a planned map, which are left alone, and what is said."""

import pytest

from tests.end_to_end import assets
from tests.seams.cases import results_of

ALL_DEVICES = [f"npu:{index}" for index in range(4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What loading_cases.py wrote: it loads a tiny untied model on four simulated devices in each way."""
    model = assets.tiny_model_folder(tied=False)
    return results_of("loading_cases.py", model, tmp_path_factory.mktemp("loading"))


def headlines(outcome):
    return [line for line in outcome["log"] if " map for LlamaForCausalLM" in line]


@pytest.mark.parametrize("name", ["auto", "balanced", "base class", "sequential intercepted", "no map intercepted"])
def test_intercepted_values_get_a_balanced_map(results, name):
    """A map of integers over all devices, unlike the library's own, and one table that shows it."""
    outcome = results[name]
    assert outcome["types"] == ["int"] and outcome["map"] != results["library's own"]["map"]
    assert len(set(outcome["map"].values())) >= 3
    assert len(headlines(outcome)) == 1 and headlines(outcome)[0].startswith("balance_shim: balanced map")


def test_switched_off_the_library_decides(results):
    """The map is the library's own and nothing is said."""
    assert results["off"]["map"] == results["library's own"]["map"] and results["off"]["log"] == []


@pytest.mark.parametrize(
    ("name", "devices"),
    [("sequential", ["npu:0"]), ("explicit map", ["npu:2"]), ("one device", ["npu:1"]), ("no map", ["cpu"])],
)
def test_other_values_are_left_alone(results, name, devices):
    """Explicit maps, devices, "sequential" and no map at all mean what they mean without the shim."""
    assert results[name]["devices"] == devices and results[name]["log"] == []


def test_the_scripts_max_memory_is_respected(results):
    """Devices that the script's max_memory leaves out are not used."""
    assert results["script's max_memory"]["devices"] == ["npu:1", "npu:3"]
    assert results["script's max_memory without devices"]["devices"] == ["cpu"]
    assert results["device kept free"]["devices"] == ["npu:1", "npu:2", "npu:3"]


def test_a_device_that_cannot_be_asked_is_left_out(results):
    """The other three are used, and one line names the one that is full."""
    outcome = results["full device"]
    assert outcome["devices"] == ["npu:0", "npu:2", "npu:3"]
    assert len([line for line in outcome["log"] if "npu:1 is not used" in line]) == 1


def test_excluded_devices_are_never_asked(results):
    """Neither the one that the script leaves out nor the one with a cap of 0: a question makes a context."""
    outcome = results["devices not asked"]
    assert outcome["devices"] == ["npu:0", "npu:3"] and outcome["asked"] == [0, 3]


def test_display_cards_are_used_only_where_they_are_needed_or_named(results):
    """A line names the card that is left out; where nothing fits without such cards, they are used."""
    left_out = "npu:2 (simulated 1.0 GiB, 1.0 MiB) not used"
    assert results["display card"]["devices"] == ["npu:0", "npu:1", "npu:3"]
    assert any(left_out in line for line in results["display card"]["log"])
    assert len(results["display card, named"]["devices"]) == 4
    assert not any(left_out in line for line in results["display card, named"]["log"])
    assert results["one large device"]["devices"] == ["npu:0"]
    assert len(results["display cards needed"]["devices"]) > 1


def test_caps_keep_a_device_lighter(results):
    """A capped device gets less: here none of the large blocks."""
    capped = [name for name, place in results["max_memory"]["map"].items() if place == "0"]
    assert "lm_head" not in capped and "model.embed_tokens" not in capped


def test_what_does_not_fit_is_said_and_left_to_the_library(results):
    """Never a silent spill: one warning with the figures, then what the library does."""
    lines = results["too small"]["log"]
    assert len(lines) == 1 and "does not fit 4 x 2.0 MiB" in lines[0] and "too much" in lines[0]
    assert results["too small"]["map"] == results["library's own"]["map"]


def test_the_plan_can_be_silent_or_written(results):
    """BALANCE_REPORT=off says nothing; a folder gets the plan and a map that holds what was used."""
    assert results["report off"]["log"] == []
    files = results["report in a folder"]["files"]
    assert list(files) == ["device_map.json", "plan.json", "run.json"]
    assert {key: str(place) for key, place in files["device_map.json"].items()} == results["report in a folder"]["map"]
    plan = files["plan.json"]
    assert plan["mode"] == "balanced" and plan["model"]["class"] == "LlamaForCausalLM"
    for device in plan["devices"]:
        assert device["predicted_peak"] == sum(device["terms"].values())
    assert plan["lower_bound"] <= max(device["predicted_peak"] for device in plan["devices"])


def test_torchrun_with_one_process_is_no_tensor_parallelism(results):
    """transformers 4.50 to 4.53 turn "auto" into tensor parallelism when WORLD_SIZE is set; the map is made anyway."""
    assert results["torchrun with one process"]["map"] == results["auto"]["map"]


def test_several_processes_are_left_to_the_library(results):
    """Each rank would spread its model over all devices: the library's own map, and one line."""
    outcome = results["torchrun with two processes"]
    assert outcome["map"] == results["library's own"]["map"]
    assert len(outcome["log"]) == 1 and "2 processes" in outcome["log"][0]


@pytest.mark.parametrize("name", ["user's map", "mode auto with a map"])
def test_the_users_map_is_used(results, name):
    """Mode map takes the user's map as it is, whatever accelerator its author wrote."""
    assert results[name]["map"] == {"model": "1", "lm_head": "2"}
    assert results[name]["devices"] == ["npu:1", "npu:2"]


def test_mode_auto_says_why(results):
    """It takes the map if there is one, else balances, and says so."""
    assert any("auto chooses map" in line for line in results["mode auto with a map"]["log"])
    assert any("auto chooses balanced" in line for line in results["mode auto without a map"]["log"])
    assert results["mode auto without a map"]["map"] == results["auto"]["map"]


def test_a_map_that_is_not_used_is_said(results):
    """A user who brought a map learns that the script's device_map kept it from being used."""
    lines = results["user's map not used"]["log"]
    assert len(lines) == 1 and "BALANCE_INTERCEPT" in lines[0]


def test_a_wrong_map_stops_before_weights_are_read(results):
    """The error is about the map although the weights are damaged; with a good map it is about the weights."""
    wrong, good = results["wrong map, damaged weights"], results["good map, damaged weights"]
    assert wrong["error"] == "DeviceMapError" and "did you mean 'lm_head'" in wrong["message"]
    phrases = ("size mismatch", "ismatched", "tensor of shape torch.Size([3, 3])")  # of different versions
    assert any(phrase in good["message"] for phrase in phrases)


def test_a_failing_planner_does_not_stop_the_program(results):
    """One warning that names the failure, then the library's own map; under BALANCE_STRICT the failure itself."""
    failed = results["planner fails"]
    assert failed["map"] == results["library's own"]["map"]
    assert len(failed["log"]) == 1 and "ZeroDivisionError: planted" in failed["log"][0]
    assert results["planner fails, strict"]["error"] == "ZeroDivisionError"


def test_the_class_is_as_found_afterwards(results):
    """After all this the very object is back in the class."""
    assert results["restored"] is True


def test_placement_does_not_change_results(results):
    """Logits on four devices are those on none."""
    assert len(results["devices of the model that ran"]) > 1
    assert results["largest difference of logits"] < 1e-5
