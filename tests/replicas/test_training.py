"""Ranks that train replicas on their shares of four simulated devices, with real processes on gloo."""

import pytest
import torch

from tests import models
from tests.end_to_end.assets import tiny_model_folder
from tests.replicas.running import train

SAME = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.saved_llama(tmp_path_factory.mktemp("model") / "model", hidden_size=128, num_hidden_layers=8)


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """Return a function: name of a training -> its outcome in one process and in two ranks, same global batch."""

    def run(name):
        tiny = str(tiny_model_folder(layers=2))
        one, two = (tmp_path_factory.mktemp(f"{name}-{number}") for number in ("one", "two"))
        alone = train(name, model, one, rows=4, TOKENIZER=tiny)
        return alone, train(name, model, two, ranks=2, rows=2, TOKENIZER=tiny)

    return run


@pytest.mark.parametrize("name", ["plain", "lora", "checkpointing", "sft", "dpo"])
def test_ranks_learn_what_one_process_learns(pair, name):
    """The same losses and the same saved weights at the same global batch, and each peak as predicted."""
    one, two = pair(name)
    assert one.said["processes"] == 1 and two.said["processes"] == 2
    assert one.said["devices"] == ["npu:0", "npu:1", "npu:2", "npu:3"] and two.said["devices"] == ["npu:0", "npu:2"]
    assert two.said["losses"] == pytest.approx(one.said["losses"], **SAME) and len(set(two.said["losses"])) == 4
    assert two.said["evaluations"] == pytest.approx(one.said["evaluations"], **SAME)
    saved, expected = (_weights(outcome.folder / "saved") for outcome in (two, one))
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-3, atol=2e-5, msg=key)
    for index, predicted in two.predicted.items():
        assert two.peaks[index] == pytest.approx(predicted, rel=0.03), (name, index)
    assert two.log.count("replicas: rank 0 on npu:0+2, rank 1 on npu:1+3") == 1
    assert two.log.count("memory of the simulated devices") == 1


def _weights(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
