"""Seam 2: the real workload beside the plan, and losses that find their way between devices."""

import pytest

from balance_shim.training.longest_batch import longest_examples
from balance_shim.versions import version_of
from tests import models
from tests.seams.cases import results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What trainer_cases.py wrote: it trains a tiny untied model on four simulated devices in each way."""
    folder = tmp_path_factory.mktemp("trainer")
    return results_of("trainer_cases.py", models.saved_llama(folder / "model"), folder)


@pytest.mark.parametrize("name", ["balanced", "arguments after the model", "data set that counts"])
def test_losses_are_those_without_the_shim(results, name):
    """Same seed, same losses as on one device without the shim; and the random state behind the Trainer is the same."""
    assert len(results[name]["devices"]) > 1
    assert results[name]["losses"] == pytest.approx(results["one device"]["losses"], rel=1e-5)
    assert results[name]["random number at the start"] == results["one device"]["random number at the start"]


def test_the_real_workload_is_said_beside_the_plan(results):
    """What differs from the plan is named, with the peaks; a plan that was right gets one line."""
    differs = [line for line in results["balanced"]["log"] if "workload differs" in line]
    assert len(differs) == 1 and "seq_len 2048 -> 24" in differs[0] and "batch_size" not in differs[0]
    late = [line for line in results["arguments after the model"]["log"] if "workload differs" in line]
    assert "batch_size 1 -> 2" in late[0] and "accumulation 1 -> 2" in late[0]
    assert any("workload is as planned" in line for line in results["as planned"]["log"])


def test_blocks_move_when_the_plan_was_made_for_something_else(results):
    """A map planned for a wrong guess is changed before the first step, and the losses stay what they were."""
    outcome = results["planned for another workload"]
    assert len([line for line in outcome["log"] if ": moved " in line]) == 1
    assert outcome["losses"] == pytest.approx(results["one device"]["losses"], rel=1e-5)
    assert not [line for line in results["as planned"]["log"] if ": moved " in line]


def test_blocks_stay_beside_what_the_script_keeps_of_them(results):
    """An average of the weights, begun before training, would be on other devices than they are then."""
    outcome = results["planned for another workload, with an average of the weights"]
    assert outcome["losses"] == pytest.approx(results["one device"]["losses"], rel=1e-5)
    assert not [line for line in outcome["log"] if ": moved " in line]
    assert len([line for line in outcome["log"] if "tensors with the shapes of parameters" in line]) == 1


def test_a_loss_computed_on_the_heads_device(results):
    """Without the shim such a trainer stops; with it the losses are those of one device."""
    assert "error" in results["own loss, off"] and "device" in results["own loss, off"]["message"]
    assert results["own loss"]["losses"] == pytest.approx(results["own loss, one device"]["losses"], rel=1e-5)
    # It stays a tensor, which a trainer may move to where it needs it.
    version = version_of("transformers")
    kind = "Tensor" if version >= (4, 50) else "int" if version >= (4, 46) else "NoneType"
    assert results["own loss"]["divisors"] == [kind]
    assert results["own loss that moves the count"]["losses"] == results["own loss"]["losses"]


def test_data_sets_that_may_have_effects_are_not_read(results):
    """A data set of a class of its own is asked for no more rows than without the shim."""
    assert results["data set that counts"]["rows read"] == results["data set that counts, off"]["rows read"]
    assert any("assuming 2048 tokens" in line for line in results["data set that counts"]["log"])


def test_a_model_without_a_map_gets_one_hint(results):
    """On a machine with several devices the user learns why nothing was balanced."""
    assert [line for line in results["no device map"]["log"] if "BALANCE_INTERCEPT=auto,balanced,none" in line]
    assert results["explicit map"]["log"] == []


def test_what_will_not_fit_is_said_before_training(results):
    """With the workload known, a warning tells by how much, and what would fit."""
    warnings = [line for line in results["does not fit"]["log"] if "warning: predicted not to fit" in line]
    assert len(warnings) == 1 and "What would fit:" in warnings[0]


def test_longest_rows():
    """Lists and plain data sets are read; transforms and other classes are not."""
    datasets = pytest.importorskip("datasets")
    examples = [{"input_ids": [1] * length} for length in (3, 9, 5)]
    lengths = [len(example["input_ids"]) for example in longest_examples(examples, 2)]
    assert lengths == [9, 5]
    plain = datasets.Dataset.from_list(examples)
    assert [len(example["input_ids"]) for example in longest_examples(plain, 2)] == [9, 5]
    assert [len(example["input_ids"]) for example in longest_examples(plain.with_format("torch"), 5)] == [9, 5, 3]
    assert longest_examples(plain.with_transform(lambda batch: 1 / 0), 1) == []
    assert longest_examples(datasets.Dataset.from_dict({"text": ["a"]}), 1) == [{"text": "a"}]
    assert longest_examples(iter(examples), 1) == [] and longest_examples([], 1) == []


def test_a_placed_model_is_not_copied_to_other_devices(results):
    """A map of one device would have the Trainer train copies (DataParallel) with several times the batch on CUDA."""
    outcome = results["map of one device"]
    assert outcome["batch size"] == 2 and outcome["devices"] == ["npu:0"]
    assert "DataParallel" not in outcome["wrapped"]
    assert outcome["losses"] == pytest.approx(results["one device"]["losses"], rel=1e-5)


def test_a_script_that_would_have_trained_copies_is_told_of_its_other_batch(results):
    """Only where it has no device map: with one, CUDA's Trainer would not have made copies either."""
    lines = [line for line in results["no device map, balanced"]["log"] if "DataParallel" in line]
    assert (
        len(lines) == 1 and "4 copies" in lines[0] and "16 sequences per step" in lines[0] and "4 per step" in lines[0]
    )
    assert "gradient_accumulation_steps=8" in lines[0]
    assert not any("DataParallel" in line for line in results["device map, balanced"]["log"])


def test_devices_that_the_script_leaves_out_are_not_asked_where_training_begins(results):
    """A question would make a context on a device that may be somebody else's: neither plan asks."""
    outcome = results["two devices of four"]
    assert outcome["devices"] == ["npu:0", "npu:2"] and outcome["asked"] == [0, 2]
