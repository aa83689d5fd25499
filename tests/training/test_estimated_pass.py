"""A second pass that cannot trace: the first pass's figures hold, and no block moves for an estimate."""

from dataclasses import replace

import transformers

from balance_shim.device import describe
from balance_shim.memory.cost import is_estimate
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from balance_shim.training import replan
from balance_shim.units import MIB
from tests import models


def test_the_first_pass_is_scaled_by_tokens_and_the_map_stays(monkeypatch):
    """Kernels that the Trainer puts into a model stop its trace: twice the tokens, twice the activations, no move."""
    config = transformers.LlamaConfig(**models.SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    machine = tuple(describe(index, f"cuda:{index}", 64 * MIB, Settings()) for index in range(2))
    model = models.on_meta(transformers.LlamaForCausalLM, config)
    request = Request(TrainingCase.of(model, Workload(batch_size=1, seq_len=64)), machine)
    assumed = planner.balanced(request)
    assert assumed is not None and not assumed.is_estimate
    costed, recomputed = planner.costed_for(request)
    refused = replace(costed, source="formula", method="estimated by a formula, because it fails in a dry run")
    monkeypatch.setattr(planner, "costed_for", lambda request: (refused, recomputed))
    monkeypatch.setattr(planner, "solved", lambda *_: fail_on_planning())

    longer = request.with_workload(seq_len=128)
    outcome = replan.plan_in_force(longer, assumed)
    assert outcome.plan.is_estimate and "scaled by the number of tokens" in outcome.plan.notes[-1]
    for before, after in zip(assumed.devices, outcome.plan.devices, strict=True):
        assert after.terms["activations"] == 2 * before.terms["activations"]
        assert after.terms["weights"] == before.terms["weights"]
    assert replan.moved_if_better(None, outcome) is outcome

    other = request.with_workload(gradient_checkpointing=True)
    estimate = replan.plan_in_force(other, assumed).plan
    assert is_estimate(estimate.source) and not any("scaled" in note for note in estimate.notes)


def fail_on_planning():
    raise AssertionError("a map was looked for")
