"""Layers that are recomputed one by one: which, and what that changes."""

from pathlib import Path

import pytest
import torch
import transformers

from balance_shim.device import Device
from balance_shim.memory.recomputation import recompute_only
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from balance_shim.training import checkpointing
from tests import models
from tests.seams.cases import results_of

MIB = 1 << 20


def plan_on(sizes, **changes):
    devices = tuple(Device(index, f"npu:{index}", size, size) for index, size in enumerate(sizes))
    workload = Workload(seq_len=512, batch_size=4, **changes)
    return planner.balanced(Request(TrainingCase.of(models.llama(), workload), devices, selective=True))


def test_no_more_layers_than_it_takes():
    """With room nothing is recomputed, with none everything; between, one layer less would not fit."""
    roomy = plan_on([1 << 30] * 2)
    assert roomy.recomputed == frozenset() and not roomy.workload.gradient_checkpointing
    peaks = [roomy.worst.predicted_peak]
    tight = plan_on([MIB] * 2)
    assert len(tight.recomputed) == models.SIZES["num_hidden_layers"] and tight.shortfall
    least = tight.worst.predicted_peak
    counts = []
    for part in (0.2, 0.4, 0.6, 0.8):
        size = int(least + part * (peaks[0] - least))
        plan = plan_on([size] * 2)
        assert not plan.shortfall
        counts.append(len(plan.recomputed))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 0


def test_unequal_devices_recompute_where_it_is_tight():
    """The small device's layers are recomputed before the large one's."""
    roomy = plan_on([1 << 30] * 2)
    total = sum(device.predicted_peak for device in roomy.devices)
    plan = plan_on([int(total * 0.28), total])
    assert not plan.shortfall and 0 <= len(plan.recomputed) < models.SIZES["num_hidden_layers"]


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_only_the_chosen_layers_run_twice(number):
    """Layers that are named run their forward twice in a step, the others once; gradients are the same."""
    torch.manual_seed(0)
    sizes = {**models.SIZES, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
    ids = torch.randint(0, 500, (2, 16))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    chosen = frozenset(f"model.layers.{index}" for index in range(number))
    recompute_only(model, chosen)
    calls = {}
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    after = gradients()
    assert calls == {f"model.layers.{index}.self_attn": 2 if index < number else 1 for index in range(6)}
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_set_of_layers_after_another():
    """Choosing again leaves nothing of the choice before."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**models.SIZES)).train()
    ids = torch.randint(0, 500, (1, 8))
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(0))
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    for chosen, expected in (({0}, [0, 0, 1]), ({1}, [0, 1, 1]), (set(), [0, 1])):
        recompute_only(model, frozenset(f"model.layers.{index}" for index in chosen))
        calls.clear()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert sorted(calls) == expected


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpointing")
    cases = Path(__file__).with_name("checkpointing_cases.py")
    return results_of(cases, models.saved_llama(folder / "model"), folder)


@pytest.mark.parametrize(
    "name",
    ["auto, roomy", "auto, tight", "on", "off", "auto, LoRA", "on, LoRA, re-entrant", "on, not placed",
     "on, not placed, LoRA", "off, not placed"],
)  # fmt: skip
def test_a_script_trains_with_the_variable(results, name):
    """Whatever the variable says, a plain script has the losses that it had, and recomputes what it should."""
    outcome = results[name]
    plain = results["without, LoRA" if "LoRA" in name else "without"]
    assert outcome["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    twice = sum(count == 2 for count in outcome["runs"])
    layers = len(outcome["runs"])
    if name.startswith("auto, ") and name != "auto, roomy":
        assert 0 < twice < layers
    else:
        assert twice == (layers if name.startswith("on") else 0)
    assert outcome["re-entrant"] == name.endswith("re-entrant")


def test_nothing_is_switched_off_that_is_not_on(monkeypatch):
    """Classes that only claim to support checkpointing raise when it is switched off, which would end the training."""
    model = models.llama()

    def refuse(self):
        raise ValueError(f"{type(self).__name__} is not compatible with gradient checkpointing")

    for kind in ("activation", "gradient"):
        monkeypatch.setattr(type(model), f"{kind}_checkpointing_disable", refuse, raising=False)
    recompute_only(model, frozenset())


class StandIn:
    """A trainer that takes callbacks."""

    def add_callback(self, _):
        pass


@pytest.mark.parametrize("size", [1 << 30, 4 * MIB])
def test_the_line_does_not_say_that_it_fits_where_it_does_not(size, monkeypatch):
    plan = plan_on([size] * 2)
    messages = []
    monkeypatch.setattr("balance_shim.log.info", messages.append)
    monkeypatch.setattr("balance_shim.state.settings", lambda: Settings(gradient_checkpointing="auto"))
    checkpointing.arrange(StandIn(), models.llama(), plan)
    assert messages[0].endswith("as many as possible" if size < 1 << 30 else "as few as fit")
    assert bool(plan.shortfall) == (size < 1 << 30)
