"""Traces of models, and in surroundings, that are not as the library's examples: traced all the same, or estimated."""

import functools
import inspect
import logging
import random
import sys
import types

import numpy
import pytest
import torch
import transformers

from balance_shim.memory.profile import profile
from balance_shim.memory.structure import structure_of
from balance_shim.memory.tracing import layers, machine
from balance_shim.memory.tracing.machine import TracedTensor, traced, tracing
from balance_shim.memory.tracing.trace import trace
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from tests import models
from tests.memory.traced_costs import WORKLOAD, costs_of, nothing_changes, profiled


def test_a_model_that_accelerate_has_placed_is_traced():
    """Hooks of a device map are left out of the trace and stay where they are; the figures are the same."""
    from accelerate import dispatch_model

    model = models.llama()
    expected = costs_of(model)
    real = transformers.LlamaForCausalLM(model.config)
    device_map = {name: "cpu" for name, _ in real.named_children()}
    device_map |= {"model": "cpu"}
    placed = dispatch_model(real, device_map, main_device="cpu", force_hooks=True)
    hooked = [name for name, module in placed.named_modules() if hasattr(module, "_hf_hook")]
    assert hooked
    with nothing_changes(placed):
        costs = costs_of(placed)
    assert hooked == [name for name, module in placed.named_modules() if hasattr(module, "_hf_hook")]
    assert costs == expected


def test_a_model_in_inference_or_autocast_is_traced_the_same():
    """What surrounds the call, be it inference mode, no_grad or another default type, changes nothing."""
    model = models.llama()
    expected = costs_of(model)
    with torch.inference_mode():
        assert costs_of(model) == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert costs_of(model) == expected
    finally:
        torch.set_default_dtype(torch.float32)


class Uncopied(torch.nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("this holds a lock")


def broken_forward(self, *args, **kwargs):
    raise KeyError("no such thing")


def test_hooks_of_the_script_do_not_run():
    """A script that counts its forward passes, or keeps what layers return, sees nothing of a trace."""
    model, seen = models.llama(), []
    model.register_forward_pre_hook(lambda *_: seen.append("model"), with_kwargs=True)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.model.layers[1].register_full_backward_hook(lambda *_: seen.append("gradient"))
    costs_of(model)
    assert seen == []


def with_call_before_forward(model, act):
    """Return `model` with a forward pass of a class of its own, which calls `act` first."""
    original = type(model).forward

    class CallingFirst(type(model)):
        def forward(self, *args, **kwargs):
            act()
            return original(self, *args, **kwargs)

    CallingFirst.forward.__signature__ = inspect.signature(original)
    model.__class__ = CallingFirst
    return model


def test_random_numbers_of_a_trace_are_not_missing_afterwards():
    """A model that draws from Python or numpy (layers dropped at random) draws the same in training, traced or not."""
    model = with_call_before_forward(models.llama(), lambda: (random.random(), numpy.random.rand(), torch.rand(1)))
    with nothing_changes(model):
        assert profiled(model)[1].method == "traced"


def test_a_model_that_ends_the_program_is_traced_without_it():
    """A forward pass that exits, as some do over inputs that they do not like, does not end the program in a trace."""
    _, model_profile = profiled(with_call_before_forward(models.llama(), lambda: sys.exit("no such task")))
    assert model_profile.method.startswith("traced block by block, because") and "no such task" in model_profile.method


def test_a_model_that_takes_too_long_is_estimated(monkeypatch):
    """A loop over all tokens would be minutes of tracing: it is given up once, and nothing else is tried."""
    monkeypatch.setattr(machine, "MOST_OPERATIONS", 5000)
    calls = []

    def loop():
        calls.append(1)
        value = torch.zeros(4, device="cpu:1")
        for _ in range(6000):
            value = value + 1

    model = with_call_before_forward(models.llama(), loop)
    _, model_profile = profiled(model)
    assert (
        model_profile.method.startswith("estimated by a formula, because") and "takes too long" in model_profile.method
    )
    assert len(calls) == 1
    _, again = profiled(model)  # as the second pass does
    assert again.source == model_profile.source and again.method.startswith("estimated") and len(calls) == 1


def test_a_batch_that_the_host_could_not_hold_is_not_made():
    """Numbers of tokens beyond anything are planned for by a formula; making such a batch would end the program."""
    _, model_profile = profiled(models.llama(), Workload(batch_size=10**6, seq_len=10**6))
    assert model_profile.method.startswith("estimated by a formula, because 1000000 x 1000000 tokens")


def test_layers_with_a_part_in_common_are_traced_all():
    """What layers hold together counts with the last of them, which speaks for no other one."""
    model = models.llama()
    decoder_layers = model.model.layers
    decoder_layers[4].mlp = decoder_layers[1].mlp
    sample = layers.sample(model, structure_of(model))
    assert not sample.left_out & {"model.layers.1", "model.layers.4"}
    assert "model.layers.4" not in (sample.speaks_for["model.layers.3"], sample.speaks_for["model.layers.5"])


def test_what_is_said_once_is_still_to_be_said():
    """What transformers says once in a process is not used up by a trace, in which nobody hears it."""
    logger, messages = transformers.utils.logging.get_logger("transformers.test"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    model = with_call_before_forward(models.llama(), lambda: logger.warning_once("eager attention is used"))
    assert profiled(model)[1].method == "traced" and not messages
    logger.warning_once("eager attention is used")
    assert messages == ["eager attention is used"]


@pytest.mark.parametrize("where", ["", "model.layers.2"])
def test_a_forward_function_that_a_script_has_put_in_does_not_run(where):
    """A function in the place of a module's forward knows the original: run there, its weights would get gradients."""
    model, expected, calls = transformers.LlamaForCausalLM(models.llama().config), costs_of(models.llama()), []
    module = model.get_submodule(where)
    original = module.forward

    def forward(*args, **kwargs):
        calls.append(where)
        return original(*args, **kwargs)

    module.forward = forward
    with nothing_changes(model):
        assert costs_of(model) == expected
    assert not calls and all(parameter.grad is None for parameter in model.parameters())


def test_a_bound_forward_that_holds_the_original_runs_the_copy():
    """ms-swift gives multimodal models a `forward` whose closure has the language model; a trace does not run that."""
    model, expected, calls = transformers.LlamaForCausalLM(models.llama().config), costs_of(models.llama()), []
    inner, plain, partner, original = model, type(model).forward, functools.partial(model.forward), id(model)

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        calls.append(original in (id(inner), id(partner.func.__self__)))
        return plain(inner, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    with nothing_changes(model):
        assert costs_of(model) == expected and profiled(model)[1].method == "traced"
    assert calls and not any(calls) and all(parameter.grad is None for parameter in model.parameters())


def test_real_weights_are_no_part_of_a_trace():
    """A model that a function hides in a dict is estimated: to run it would take memory on real devices."""
    model = transformers.LlamaForCausalLM(models.llama().config)
    hidden, plain = {"model": model}, type(model).forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return plain(hidden["model"], *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    with nothing_changes(model):
        assert profiled(model)[1].method != "traced"


def test_a_compiled_layer_is_traced():
    """torch.compile around a layer changes nothing of what is found, and is still there afterwards."""
    model, expected = models.llama(), costs_of(models.llama())
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
    with nothing_changes(model):
        assert list(costs_of(model).values()) == list(expected.values())


def test_a_model_that_only_claims_to_support_checkpointing_is_traced(monkeypatch):
    """Remote classes do that, and transformers refuses to switch off what they do not have."""
    model = models.llama()

    def refuse(self):
        raise ValueError(f"{type(self).__name__} is not compatible with gradient checkpointing")

    monkeypatch.setattr(type(model), "gradient_checkpointing_disable", refuse)
    assert profiled(model)[1].method == "traced"


def test_a_layer_that_runs_several_times_is_traced():
    """It takes its weights once, and keeps what it keeps for each time that it runs."""
    config = models.llama().config
    once, twice = models.on_meta(transformers.LlamaForCausalLM, config), models.llama()
    once.model.layers = once.model.layers[:1]
    twice.model.layers = torch.nn.ModuleList([twice.model.layers[0]] * 2)
    one, two = costs_of(once), costs_of(twice)
    held = [sum(getattr(two[name], term) for name in two if ".layers." in name) for term in ("weights", "activations")]
    assert held[0] == one["model.layers.0"].weights
    assert held[1] == pytest.approx(2 * one["model.layers.0"].activations, rel=0.2)


def test_a_model_that_cannot_be_copied_is_estimated_with_the_reason():
    """Whatever stands in the way of a copy, there are figures, and it is said that they are estimates and why."""
    model = models.llama()
    with torch.device("meta"):
        model.model.layers[1].mlp.up_proj = Uncopied(64, 160, bias=False)
    with nothing_changes(model):
        _, model_profile = profiled(model)
    assert (
        model_profile.method.startswith("estimated by a formula, because")
        and "this holds a lock" in model_profile.method
    )
    assert all(cost.gradients for cost in model_profile.costs if cost.weights > 1000)


def test_a_model_that_fails_is_estimated_with_the_reason(monkeypatch):
    """A forward pass that raises leaves the model and torch as they were, and gives estimates with its reason."""
    model = models.llama()
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", broken_forward)
    with nothing_changes(model):
        _, model_profile = profiled(model)
    assert (
        model_profile.method.startswith("estimated by a formula, because") and "no such thing" in model_profile.method
    )
    monkeypatch.undo()
    costs_of(model)  # and the next one is traced again


def test_whole_numbers_stay_and_real_ones_go():
    """Token ids keep their values in a trace, weights have shapes only, and nothing is left of either afterwards."""
    with tracing(1) as machine:
        ids, weights = traced(torch.tensor([3, 5]), 0, machine), traced(torch.ones(2), 0, machine)
        assert isinstance(ids, TracedTensor) and ids.max().item() == 5
        assert torch.tensor([ids.max(), ids.min()]).tolist() == [5, 3]
        assert weights.raw.is_meta
        del ids, weights
        assert machine.ledger.live(0) == 0


def test_a_trace_ends_with_all_memory_given_back():
    """Nothing of a trace is held by what comes out of it: the next trace starts from zero."""
    model = models.llama()
    step_trace = trace(TrainingCase.of(model, WORKLOAD))
    assert not any(isinstance(tensor, TracedTensor) for trained in step_trace.trained.values() for tensor in trained)


def test_a_model_that_talks_is_not_heard(capfd):
    """What the model prints or logs while it is traced is not on the program's standard output or error."""
    model = models.llama()
    original = type(model).forward

    class Talking(type(model)):
        def forward(self, *args, **kwargs):
            print("a picture!")
            transformers.utils.logging.get_logger("transformers").warning("a warning!")
            return original(self, *args, **kwargs)

    Talking.forward.__signature__ = inspect.signature(original)
    model.__class__ = Talking
    assert profile(TrainingCase.of(model, Workload(seq_len=64))).method == "traced"
    output = capfd.readouterr()
    assert "a picture!" not in output.out and "a warning!" not in output.err
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def test_a_model_without_a_config_is_traced():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, input_ids, labels):
            hidden = self.embedding(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            logits = self.head(hidden)
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())}

    with torch.device("meta"):
        model = Own()
    assert profiled(model)[1].method == "traced"


class Splined(torch.nn.Module):
    """Says how many features it takes and gives, as linear layers do, and has its weights under other names."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.base_weight = torch.nn.Parameter(torch.zeros(out_features, in_features))
        self.spline_weight = torch.nn.Parameter(torch.zeros(out_features, in_features, 8))

    def forward(self, hidden):
        return hidden @ (self.base_weight + self.spline_weight.sum(-1)).T


def test_a_linear_layer_of_a_model_s_own_is_no_packed_one():
    model = models.llama()
    with torch.device("meta"):
        for layer in model.model.layers:
            layer.mlp.down_proj = Splined(model.config.intermediate_size, model.config.hidden_size)
    cost = costs_of(model)["model.layers.0"]
    assert cost.gradients == cost.weights and cost.optimizer == 2 * cost.weights
