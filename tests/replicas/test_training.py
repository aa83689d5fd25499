"""Ranks that train replicas on their shares of four simulated devices, with real processes on gloo."""

import pytest
import torch

from balance_shim.versions import version_of
from tests import models
from tests.replicas.running import train
from tests.sampling import sampled

# transformers 4 rounds what it logs to four decimals.
SAME = {"rel": 1e-5, "abs": 1e-5 if version_of("transformers") >= (5,) else 1.01e-4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = models.saved_llama(tmp_path_factory.mktemp("model") / "model", hidden_size=128, num_hidden_layers=8)
    models.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """Return a function: name of a training -> its outcome in one process and in two ranks, same global batch."""

    def run(name):
        one, two = (tmp_path_factory.mktemp(f"{name}-{number}") for number in ("one", "two"))
        return train(name, model, one, micro_batch=4), train(name, model, two, ranks=2, micro_batch=2)

    return run


@pytest.mark.parametrize("name", sampled(["plain", "lora", "checkpointing", "sft", "dpo"], "plain", "sft"))
def test_ranks_learn_what_one_process_learns(pair, name):
    """The same losses and the same saved weights at the same global batch, and each peak as predicted."""
    one, two = pair(name)
    assert one.result["processes"] == 1 and two.result["processes"] == 2
    assert one.result["devices"] == ["npu:0", "npu:1", "npu:2", "npu:3"] and two.result["devices"] == ["npu:0", "npu:2"]
    assert two.result["losses"] == pytest.approx(one.result["losses"], **SAME) and len(set(two.result["losses"])) == 4
    assert two.result["evaluations"] == pytest.approx(one.result["evaluations"], **SAME)
    # Adam makes much of the last digits of gradients near zero, so weights are compared by what they give.
    torch.testing.assert_close(_logits(two), _logits(one), rtol=1e-4, atol=1e-4)
    # find_unused_parameters, which the Trainer sets without checkpointing, copies all outputs, on 4.x the logits too.
    exact = version_of("transformers") >= (5,) or name == "checkpointing"
    if name == "dpo":  # beside the model that is planned for lies the reference model, as large, on the same devices
        beyond = sum(two.peaks[index] - predicted for index, predicted in two.predicted.items())
        weights = (two.folder / "saved" / "model.safetensors").stat().st_size
        assert not exact or beyond == pytest.approx(weights, rel=0.03)
    else:
        for index, predicted in two.predicted.items() if exact else ():
            assert two.peaks[index] == pytest.approx(predicted, rel=0.03), (name, index)
    assert two.log.count("replicas: rank 0 on npu:0+2, rank 1 on npu:1+3") == 1
    assert two.log.count("memory of the simulated devices") == 1


def _logits(outcome):
    """Return the logits of the model that a run has saved, as plain transformers load it, for some tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(outcome.folder / "saved")
    with torch.no_grad():
        return model(torch.arange(3, 203).reshape(2, 100)).logits


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    """A training that the shim itself has started twice, with BALANCE_REPLICAS=2."""
    return train("plain", model, tmp_path_factory.mktemp("started"), BALANCE_REPLICAS="2")


def test_replicas_without_a_launcher(started):
    """BALANCE_REPLICAS=2 starts two ranks, says so, and leaves one report."""
    assert started.result["processes"] == 2 and started.result["devices"] == ["npu:0", "npu:2"]
    assert started.log.count("starting 2 processes for replicas of the model") == 1
    assert started.log.count("micro-batches of 2 and accumulation 2: 8 sequences per step") == 1
    assert started.log.count("memory of the simulated devices") == 1 and min(started.peaks) > 0


def test_another_number_of_replicas_resumes(model, started):
    """A checkpoint of two ranks goes on in one process, on all four devices, to the end."""
    folder = started.folder.parent
    resumed = train("resumed", model, folder, micro_batch=4)
    assert resumed.result["processes"] == 1 and len(resumed.result["devices"]) == 4
    assert len(resumed.result["losses"]) == 2 + len(started.result["losses"])  # the history of the first four goes on
    assert resumed.result["losses"][: len(started.result["losses"])] == started.result["losses"]
