"""Remedies that are named hold, and looking for them breaks nothing."""

import threading
from dataclasses import replace

import pytest
import torch
import transformers

from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner, remedies
from balance_shim.placement.request import Request
from balance_shim.report.plan_report import precision_line
from balance_shim.versions import version_of
from tests import models
from tests.placement.test_balance import machine
from tests.placement.test_verification import Plain

MIB = 1 << 20


def too_small_for(model, workload, part=0.95):
    """Return the request to place `model` on two devices that have so much of what it takes."""
    fitting = planner.balanced(Request(TrainingCase.of(model, workload), machine(64 << 30, 64 << 30)))
    return Request(TrainingCase.of(model, workload), machine(*[int(fitting.worst.predicted_peak * part)] * 2))


def test_what_would_fit_is_checked_not_guessed():
    """Each remedy named for a plan that does not fit does make it fit."""
    model = models.llama()
    workload = Workload(batch_size=1, seq_len=1024)
    fitting = planner.balanced(Request(TrainingCase.of(model, workload), machine(*[64 * MIB] * 2)))
    tight = machine(*[int(fitting.worst.predicted_peak * 0.95)] * 2)
    request = Request(TrainingCase.of(model, workload), tight)
    plan = planner.balanced(request)
    assert plan.shortfall
    changes = remedies.what_would_fit(plan, request)
    assert any(remedy.startswith("gradient checkpointing") for remedy in changes)


def test_half_precision_is_a_remedy_where_weights_train_in_float32():
    """It comes with a plan that fits; not for models that are in half precision, nor where nobody may choose it."""
    workload = Workload(seq_len=256)
    half, full = (models.llama().to(dtype) for dtype in (torch.bfloat16, torch.float32))
    fitting = planner.balanced(
        Request(TrainingCase.of(half, replace(workload, autocast=True)), machine(*[64 * MIB] * 2))
    )
    sizes = machine(*[int(1.2 * fitting.worst.predicted_peak)] * 2)

    def offered(model, may):
        request = Request(TrainingCase.of(model, workload), sizes, may_halve=may)
        changes = remedies.remedies_that_fit(planner.balanced(request), request)
        return "BALANCE_PRECISION=bf16" in [remedy.phrase for remedy in changes]

    assert [offered(full, True), offered(full, False), offered(half, True)] == [True, False, False]


def test_what_precision_saves_is_told_by_term():
    """Weights, gradients and AdamW's state of a bfloat16 model are half of what they would be in float32."""
    model = models.llama().to(torch.bfloat16)
    devices = machine(*[64 * MIB] * 2)
    request = Request(TrainingCase.of(model, Workload(seq_len=256)), devices)
    plan = planner.balanced(request)
    saved = remedies.saved_by_precision(plan, request, "float32", autocast=False)
    weights = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert (saved["weights"], saved["gradients"], saved["optimizer"]) == (weights, weights, 2 * weights)
    assert saved["activations"] > 0
    assert precision_line("bf16", "float32", {"weights": MIB, "gradients": 0, "optimizer": -3 * MIB}) == (
        "BALANCE_PRECISION=bf16 instead of float32 takes 2.0 MiB more on all devices together: "
        "weights 1.0 MiB, optimizer -3.0 MiB"
    )


def test_a_micro_batch_of_one_is_accumulated():
    """`BALANCE_MICRO_BATCH=1` keeps the batch that is learned from, so that gradients wait on the device."""
    request = too_small_for(models.llama(), Workload(batch_size=4, seq_len=1024), part=0.9)
    changes = remedies.remedies_that_fit(planner.balanced(request), request)
    (remedy,) = [change for change in changes if "micro-batch" in change.phrase]
    assert remedy.changes == {"batch_size": 1, "accumulation": 4} and remedy.plan.workload.accumulation == 4


class Locked(Plain):
    """Cannot be copied, and so not traced either."""

    def __init__(self, config):
        super().__init__(config)
        self.lock = threading.Lock()


class NotCheckpointed(Locked):
    supports_gradient_checkpointing = False


def locked(model_class):
    sizes = {**models.SIZES, "num_key_value_heads": 2}
    return models.on_meta(model_class, transformers.LlamaConfig(**sizes, tie_word_embeddings=False))


def test_a_model_that_cannot_be_copied_has_its_remedies_but_for_precision():
    request = replace(too_small_for(locked(Locked), Workload(seq_len=1024)), may_halve=True)
    plan = planner.balanced(request)
    phrases = [remedy.phrase for remedy in remedies.remedies_that_fit(plan, request)]
    assert phrases and "BALANCE_PRECISION=bf16" not in phrases
    assert set(remedies.saved_by_precision(plan, request, "bfloat16", autocast=False).values()) == {0}


def test_checkpointing_is_no_remedy_for_a_model_without():
    """Nor does `auto` choose layers of it, however it is estimated."""
    request = too_small_for(locked(NotCheckpointed), Workload(batch_size=4, seq_len=4096))
    changes = remedies.what_would_fit(planner.balanced(request), request)
    assert changes and not any("checkpointing" in remedy for remedy in changes)
    plan = planner.balanced(replace(request, selective=True))
    assert plan.recomputed == frozenset() and plan.shortfall


class BondedWhenRecomputed(Plain):
    """Its head meets all layers, but only where they are recomputed."""

    def logits_of(self, embedded, hidden):
        if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            hidden = hidden + sum(layer.self_attn.q_proj.weight.sum() for layer in self.model.layers)
        return self.lm_head(hidden)


@pytest.mark.skipif(version_of("transformers") < (4, 53), reason="its layers do not recompute themselves")
def test_a_remedy_under_which_nothing_can_be_placed_is_none():
    """And `auto` recomputes nothing where that is what fits."""
    config = transformers.LlamaConfig(
        **{**models.SIZES, "hidden_size": 1024, "intermediate_size": 8192}, num_key_value_heads=2
    )
    model, workload = models.on_meta(BondedWhenRecomputed, config), Workload(seq_len=64)
    request = too_small_for(model, workload)
    request = replace(request, devices=request.devices + machine(*[device.available for device in request.devices]))
    assert not planner.balanced(replace(request, selective=True)).recomputed
    short = Request(TrainingCase.of(model, workload), machine(*[800 * MIB] * 4))
    plan = planner.balanced(short)
    assert plan.shortfall
    # With adapters the layers are small enough to be on one device together.
    assert not any(remedy.startswith("gradient checkpointing") for remedy in remedies.what_would_fit(plan, short))


class Failing(torch.nn.Module):
    """Runs on no shapes; counts the attempts."""

    attempts = 0

    def forward(self, hidden):
        type(self).attempts += 1
        raise ValueError("not on shapes")


def test_remedies_of_an_estimated_plan_run_nothing():
    """What failed in a dry run once is not tried again for each remedy: that took minutes for a detection model."""
    model = models.llama()
    model.model.norm = Failing()
    request = too_small_for(model, Workload(batch_size=4, seq_len=1024))
    plan = planner.balanced(request)
    assert plan.is_estimate and plan.shortfall and Failing.attempts
    Failing.attempts = 0
    assert remedies.what_would_fit(plan, request) and not Failing.attempts
