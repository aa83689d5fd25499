"""`balance_shim.plan`: the planner as a function, for notebooks and tools."""

import pytest
import transformers

import balance_shim
from balance_shim.errors import BalanceError
from balance_shim.units import MIB
from tests import models
from tests.cli.running import together

MACHINE = "4x512MiB"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small model on the meta device, and its config in a folder."""
    model = models.ALL["llama"]()
    folder = tmp_path_factory.mktemp("llama")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return model, folder


def test_a_path_a_config_and_the_command_agree(llama):
    """Whichever way a model is named, the plan is the one of `balance-shim plan`."""
    _, folder = llama
    config = transformers.AutoConfig.from_pretrained(folder)
    by_path = balance_shim.plan(folder, MACHINE, seq_len=64, precision="fp32", cache="off")
    by_config = balance_shim.plan(config, MACHINE, seq_len=64, precision="fp32", cache="off")
    assert by_path.to_json() == by_config.to_json()
    arguments = (folder, "--gpus", MACHINE, "--seq-len", 64, "--precision", "fp32", "--json")
    ((code, output, errors),) = together(arguments)
    assert (code, errors) == (0, "")
    assert f'"predicted_peak": {by_path.worst.predicted_peak}' in output
    assert not by_path.shortfall and set(by_path.device_map.values()) <= {0, 1, 2, 3}


def test_a_model_is_planned_for_what_trains(llama):
    """Frozen parameters of a model that is there get no gradients and no optimizer state."""
    model, _ = llama
    trained = balance_shim.plan(model, MACHINE, seq_len=64, cache="off")
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    frozen = balance_shim.plan(model, MACHINE, seq_len=64, cache="off")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer_state = [sum(device.terms["optimizer"] for device in plan.devices) for plan in (trained, frozen)]
    assert optimizer_state[1] < optimizer_state[0] - MIB


@pytest.mark.parametrize(
    ("arguments", "error", "phrases"),
    [({"devices": "4 big ones"}, BalanceError, "--gpus"), ({"devices": ""}, BalanceError, "--gpus is needed"),
     ({"devices": MACHINE, "seq_length": 5}, TypeError, "no argument 'seq_length'"),
     ({"devices": MACHINE, "tuning": "qlora"}, BalanceError, "--tuning"),
     ({"devices": "1x1MiB", "precision": "fp32"}, BalanceError, "fits under no map")],
)  # fmt: skip
def test_what_cannot_be_planned(llama, monkeypatch, arguments, error, phrases):
    """One line names the value or the gap."""
    monkeypatch.delenv("BALANCE_SIMULATE", raising=False)
    with pytest.raises(error, match=phrases) as raised:
        balance_shim.plan(llama[1], **arguments)
    assert "\n" not in str(raised.value)


def test_what_is_no_model():
    """An object of another kind is named."""
    with pytest.raises(BalanceError, match="dict is not a model, config, path or hub id"):
        balance_shim.plan({}, MACHINE)
