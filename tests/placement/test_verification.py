"""What a dry run of a map shows, and what the planner makes of it."""

from dataclasses import replace

import pytest
import torch
import transformers

from balance_shim.device import Device, describe
from balance_shim.memory.colocation import NO_CONSTRAINTS, Constraints
from balance_shim.memory.cost import BlockCost
from balance_shim.memory.tracing import dry_run
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner, verification
from balance_shim.placement.balance import balance
from balance_shim.placement.plan import evaluate
from balance_shim.placement.remedies import what_would_fit
from balance_shim.placement.request import Request
from balance_shim.settings import Reserve, Settings
from balance_shim.training.replan import worth_moving
from balance_shim.versions import version_of
from tests import models

MIB = 1 << 20
WORKLOAD = Workload(batch_size=2, seq_len=64)


class Plain(transformers.LlamaForCausalLM):
    """A Llama whose loss is computed where the logits are."""

    def forward(self, input_ids, labels=None, **_):
        embedded = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = embedded
        angles = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=angles, position_ids=positions)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # 4.x
        logits = self.logits_of(embedded, self.model.norm(hidden))
        return {"loss": self.loss_of(logits.flatten(0, 1), labels.flatten())}

    def logits_of(self, embedded, hidden):
        return self.lm_head(hidden)

    def loss_of(self, logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels.to(logits.device))


class WeightOfTheEmbedding(Plain):
    def logits_of(self, embedded, hidden):
        return self.lm_head(hidden) + hidden @ self.model.embed_tokens.weight.T


class InputAtTheEnd(Plain):
    def logits_of(self, embedded, hidden):
        return self.lm_head(embedded + hidden)


class LossWhereLabelsAre(Plain):
    def loss_of(self, logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)


def request_for(model_class, devices=2, size=64 * MIB, **sizes):
    config = transformers.LlamaConfig(**{**models.SIZES, **sizes}, num_key_value_heads=2, tie_word_embeddings=False)
    settings = Settings(reserve=Reserve(fraction=0.08))
    machine = tuple(describe(index, f"cuda:{index}", size, settings) for index in range(devices))
    # Dry runs, not the source of these classes, show where the loss is computed.
    return Request(TrainingCase.of(models.on_meta(model_class, config), WORKLOAD, loss_on_first=False), machine)


@pytest.mark.parametrize(
    ("model_class", "constraints"),
    [
        (Plain, NO_CONSTRAINTS),
        (WeightOfTheEmbedding, Constraints((frozenset({"model.embed_tokens", "model.norm", "lm_head"}),))),
        (InputAtTheEnd, Constraints((frozenset({"model.embed_tokens", "model.norm"}),))),
        (LossWhereLabelsAre, Constraints(on_first=frozenset({"lm_head"}))),
    ],
)
def test_what_a_model_computes_between_its_modules_bonds_blocks(model_class, constraints):
    """A trace finds which, and still measures everything; the plan keeps them on one device, and layers move freely."""
    request = request_for(model_class, devices=3)
    costed = planner.cost(request)
    assert (costed.method, costed.constraints) == ("traced", constraints)
    plan = planner.balanced(request)
    assert not plan.notes
    for group in constraints.groups:
        assert len({plan.device_map[name] for name in group}) == 1
    assert {plan.device_map[name] for name in constraints.on_first} <= {0}
    layers = [plan.device_map[f"model.layers.{number}"] for number in range(6)]
    assert len(set(layers)) == 3


@pytest.mark.parametrize("model_class", [WeightOfTheEmbedding, InputAtTheEnd, LossWhereLabelsAre])
def test_a_map_that_does_not_run_is_solved_again_with_the_missing_bond(model_class, monkeypatch):
    """Where costs do not tell of a constraint, as those of a formula do not, the dry run does."""
    request = request_for(model_class)
    costed = replace(planner.cost(request), constraints=NO_CONSTRAINTS)
    tried = []

    def verify(*arguments):
        tried.append(original(*arguments))
        return tried[-1]

    original = verification.verify
    monkeypatch.setattr(verification, "verify", verify)
    plan = planner.solved(request, costed, None)
    assert plan is not None
    assert tried[0].met and not tried[-1].met and len(tried) <= 3, tried
    assert not plan.notes


class Skips(Plain):
    """Adds what comes out of some layers to what goes into others, far behind them."""

    skips: tuple = ()

    def forward(self, input_ids, labels=None, **_):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.model.embed_tokens(input_ids)
        angles = self.model.rotary_emb(hidden, positions)
        outputs = {}
        for number, layer in enumerate(self.model.layers):
            for source, goal in self.skips:
                hidden = hidden + outputs[source] if goal == number else hidden
            hidden = layer(hidden, position_embeddings=angles, position_ids=positions)
            hidden = outputs[number] = hidden[0] if isinstance(hidden, tuple) else hidden
        return {"loss": self.loss_of(self.lm_head(self.model.norm(hidden)).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize(
    ("skips", "devices"), [([(10, 13)], 2), ([(7, 9)], 3), ([(2, 21)], 3), ([(n, 23 - n) for n in range(12)], 2)]
)
def test_a_model_that_skips_layers_runs_under_its_plan(skips, devices, monkeypatch):
    """Also the layers that a dry run leaves out: it is repeated with all of them."""
    request = request_for(Skips, devices, num_hidden_layers=24)
    request.model.skips = tuple(skips)
    plan = planner.balanced(request)
    assert plan is not None and plan.method == "traced" and not plan.notes
    assert len({plan.device_map[f"model.layers.{number}"] for number in range(24)}) > 1 or len(skips) > 1
    monkeypatch.setattr(dry_run, "_left_out", lambda *_: frozenset())
    trial = verification.verify(request, planner.cost(request), plan.device_map)
    assert trial.blocks and not trial.met


class LayersTogether(Plain):
    def forward(self, input_ids, labels=None, **_):
        layers = self.model.layers
        everything = sum(layer.self_attn.q_proj.weight for layer in layers)
        return {"loss": everything.sum() + super().forward(input_ids, labels)["loss"].to(everything.device)}


def test_layers_that_run_on_one_device_only_get_one():
    """Or none, where that is too small: then the library's own map applies, as without us."""
    plan = planner.balanced(request_for(LayersTogether, 3))
    assert len({place for name, place in plan.device_map.items() if ".layers." in name}) == 1
    assert planner.balanced(request_for(LayersTogether, 3, size=4 * MIB, num_hidden_layers=60)) is None


class StacksItsStates(Plain):
    """Its head gets the mean of what all layers give, which meets in one operation."""

    def forward(self, input_ids, labels=None, **_):
        hidden, states = self.model.embed_tokens(input_ids), []
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        angles = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=angles, position_ids=positions)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # 4.x
            states.append(hidden)
        logits = self.lm_head(self.model.norm(torch.stack(states).mean(0)))
        return {"loss": self.loss_of(logits.flatten(0, 1), labels.flatten())}


def test_a_model_that_runs_under_no_map_gets_one_device():
    """The first that holds it, with a note; none, where none does: the library's own map applies then."""
    plan = planner.balanced(request_for(StacksItsStates, 3, size=512 * MIB, num_hidden_layers=20))
    assert plan is not None and set(plan.device_map.values()) == {0} and not plan.shortfall
    assert "its layers run on one device only, as dry runs show" in plan.notes
    assert planner.balanced(request_for(StacksItsStates, 3, size=4 * MIB, num_hidden_layers=20)) is None


class WorksMoreBesideLayers(Plain):
    """Its head takes 2 GiB for a moment beside a layer on its device, which a trace of each on its own cannot show."""

    def logits_of(self, embedded, hidden):
        if any(layer.mlp.up_proj.weight.device == hidden.device for layer in self.model.layers):
            hidden = hidden + torch.zeros(1 << 29, device=hidden.device).sum()
        return self.lm_head(hidden)


LARGE = {"hidden_size": 1024, "intermediate_size": 8192}  # layers of some 480 MiB


def test_a_peak_off_the_prediction_weighs_in_the_next_solution():
    request = request_for(WorksMoreBesideLayers, size=8 << 30, **LARGE)
    costed = planner.cost(request)
    first = balance(costed, request.devices)
    assert first["lm_head"] == first["model.layers.5"]
    trial = verification.verify(request, costed, first)
    (misprediction,) = verification.mispredictions(trial, costed, first, request.devices)
    assert misprediction.seen - misprediction.predicted > 512 * MIB
    counted = verification.corrected(trial, costed, first, request.devices[0], misprediction)
    assert verification.mispredictions(trial, counted, first, request.devices) == ()
    as_seen = evaluate("balanced", counted, first, request.devices)
    plan = planner.balanced(request)
    assert plan.worst.filled < as_seen.worst.filled


def test_a_peak_off_the_prediction_is_in_the_figures_where_no_other_map_helps():
    request = request_for(WorksMoreBesideLayers, devices=1, size=8 << 30)
    plan = planner.balanced(request)
    assert 2 << 30 < plan.worst.predicted_peak - plan.worst.terms["overhead"] < 1.1 * (2 << 30)
    (note,) = plan.notes
    assert note.startswith("cuda:0: in a dry run") and note.endswith("the figures here include it")


def test_blocks_move_for_three_percent_or_to_make_a_plan_fit():
    costed = planner.cost(request_for(Plain))
    on = dict.fromkeys((block.name for block in costed.blocks), 0)

    def of(peak, capacity):
        return evaluate("balanced", replace(costed, costs=(BlockCost(weights=peak), *costed.costs[1:])), on, [
            Device(0, "cuda:0", capacity, capacity)
        ])  # fmt: skip

    roomy, tight = 100 << 30, 40 << 30
    assert worth_moving(of(40 << 30, roomy), of(38 << 30, roomy))
    assert not worth_moving(of(40 << 30, roomy), of(int(39.5 * (1 << 30)), roomy))
    assert worth_moving(of(int(40.4 * (1 << 30)), tight), of(int(39.8 * (1 << 30)), tight))


class CallsForward(Plain):
    """Goes around the modules' hooks, as SqueezeBert does; accelerate wraps `forward` itself."""

    def logits_of(self, embedded, hidden):
        return self.lm_head.forward(hidden)


def test_a_model_that_calls_forward_itself_needs_no_bond():
    costed = planner.cost(request_for(CallsForward, 3))
    assert costed.constraints == NO_CONSTRAINTS
    device_map = {block.name: 2 if block.name == "lm_head" else 0 for block in costed.blocks}
    assert verification.verify(request_for(CallsForward, 3), costed, device_map).met == ()


def with_long_rows(size, **workload):
    """Return the request for one device and a model of which no prediction knows that it takes 2 GiB beside layers."""
    request = request_for(WorksMoreBesideLayers, devices=1, size=size)
    request = request.with_case(workload=replace(WORKLOAD, seq_len=4096, **workload))
    return replace(request, selective=True)


def as_predicted(request):
    costed = planner.cost(request)
    return evaluate("balanced", costed, balance(costed, request.devices), request.devices)


@pytest.mark.skipif(version_of("transformers") < (4, 53), reason="its layers do not recompute themselves")
def test_what_the_trial_shows_decides_how_many_layers_are_recomputed():
    roomy, tight = with_long_rows(16 << 30), with_long_rows(2400 * MIB)
    assert not as_predicted(roomy).shortfall and not as_predicted(tight).shortfall
    easy, plan = planner.balanced(roomy), planner.balanced(tight)
    assert easy.recomputed == frozenset() and not easy.shortfall
    assert plan.recomputed and not plan.shortfall
    assert 2 << 30 < plan.worst.predicted_peak < easy.worst.predicted_peak


@pytest.mark.exhaustive
def test_layers_that_differ_in_what_they_recompute_are_tried_out_as_they_are():
    """In a T5 one recomputed layer can raise the peak that all of them lower; a plan is no lower than its dry run."""
    sizes = {"d_model": 256, "d_ff": 1024, "d_kv": 32, "num_layers": 3, "num_heads": 8, "vocab_size": 512}
    model = models.on_meta(
        transformers.T5ForConditionalGeneration, transformers.T5Config(**sizes, decoder_start_token_id=0)
    )
    workload = Workload(batch_size=2, seq_len=2048)
    for size in range(1200, 1500, 60):
        devices = tuple(describe(index, f"cuda:{index}", size * MIB, Settings()) for index in range(2))
        request = Request(TrainingCase.of(model, workload), devices, selective=True)
        plan = planner.balanced(request)
        costed, recomputed = planner.costed_for(request)
        assert recomputed == plan.recomputed
        trial = verification.verify(request.with_case(workload=plan.workload), costed, plan.device_map, recomputed)
        for device in plan.devices:
            held = device.terms["weights"] + device.terms["optimizer"] + device.terms["overhead"]
            assert trial.peaks[device.device.index] + held <= 1.03 * device.predicted_peak


def test_a_remedy_that_the_trial_refutes_is_not_named():
    request = replace(with_long_rows(350 * MIB), selective=False)
    assert not as_predicted(with_long_rows(350 * MIB, batch_size=1)).shortfall
    plan = planner.balanced(request)
    assert plan.shortfall and what_would_fit(plan, request) == []
