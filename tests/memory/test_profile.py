"""The profile: exact where it can be, moving the right way elsewhere, with a formula where nothing can be traced."""

from dataclasses import replace

import pytest
import torch

from balance_shim.logits import chunks
from balance_shim.memory import estimate
from balance_shim.memory.blocks import chain
from balance_shim.memory.peak import Schedule
from balance_shim.memory.profile import profile
from balance_shim.memory.structure import structure_of
from balance_shim.memory.tracing import trace
from balance_shim.memory.tracing.errors import CannotTrace
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.optimizers import QUANTIZED, SPARES_SINCE
from balance_shim.versions import version_of
from tests import models

WORKLOAD = Workload(batch_size=2, seq_len=64)
LOGITS = WORKLOAD.tokens * models.SIZES["vocab_size"] * torch.float32.itemsize


def total(model, workload, field, **options):
    return sum(getattr(cost, field) for cost in profile(TrainingCase.of(model, workload, **options)).costs)


def by_role(model, workload, field, **options):
    """Return role -> the sum of `field` over the blocks of that role."""
    case = TrainingCase.of(model, workload, **options)
    sums = dict.fromkeys((block.role for block in case.structure.blocks), 0)
    for block, cost in zip(case.structure.blocks, profile(case).costs, strict=True):
        sums[block.role] += getattr(cost, field)
    return sums


@pytest.fixture(params=["traced", "formula"])
def way(request, monkeypatch):
    """Each test that asks for it runs with the trace and with the formula that stands in for it."""
    if request.param == "formula":

        def refuse(*_):
            raise CannotTrace("this test says so")

        monkeypatch.setattr(trace, "trace", refuse)
    return request.param


@pytest.mark.parametrize("name", models.ALL)
def test_weights_and_adam_state_are_counted_exactly(name, way):
    """Weights, gradients and AdamW state add up to the model's own bytes, tied weights counted once."""
    model = models.ALL[name]()
    model_profile = profile(TrainingCase.of(model, WORKLOAD))
    parameters = structure_of(model).parameters * torch.float32.itemsize
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert sum(cost.weights for cost in model_profile.costs) == parameters + buffers
    assert sum(cost.gradients for cost in model_profile.costs) == parameters
    assert sum(cost.optimizer for cost in model_profile.costs) == 2 * parameters


@pytest.mark.parametrize("name", models.ALL)
def test_costs_keep_what_the_composition_relies_on(name, way):
    """What a block keeps is part of what it has in each pass, and nothing is below zero."""
    model = models.ALL[name]()
    model_profile = profile(TrainingCase.of(model, WORKLOAD))
    for cost in [*model_profile.costs, model_profile.first]:
        assert 0 <= cost.activations <= min(cost.forward, cost.backward or cost.activations)
        assert min(cost.weights, cost.gradients, cost.optimizer, cost.step) >= 0
        # Some parameters have no part in the loss: a norm behind the layer whose output Llava takes.
        assert not cost.backward or cost.backward >= cost.gradients


def test_a_loss_in_chunks_needs_a_chunk(way):
    """The head holds hidden states and one chunk; what returns to the first device is not the logits."""
    model = models.llama(vocab_size=65536)
    full, chunked = (
        profile(TrainingCase.of(model, Workload(seq_len=8192, tuning="lora", loss=loss)))
        for loss in ("full", "chunked")
    )
    logits = 8192 * 65536 * torch.float32.itemsize
    assert full.costs[-1].backward > 2 * logits and full.first.forward >= logits
    assert chunked.costs[-1].backward < 1.2 * chunks.CHUNK_BYTES + 8192 * 64 * 4 * 8
    assert chunked.first.forward < logits / 100
    assert chunked.method == full.method


def test_what_trains_decides(way):
    """LoRA and plain SGD leave little or nothing of gradients and optimizer state."""
    model = models.llama()
    full = total(model, WORKLOAD, "gradients")
    assert 0 < total(model, replace(WORKLOAD, tuning="lora"), "gradients") < full / 2
    assert total(model, replace(WORKLOAD, optimizer="sgd"), "optimizer") == 0
    head_only = total(model, WORKLOAD, "gradients", trains=lambda name, _: name.startswith("lm_head"))
    assert head_only == model.lm_head.weight.numel() * model.lm_head.weight.element_size()


def test_a_frozen_tower_has_no_gradients(way):
    """Tuning "frozen" trains everything but the tower."""
    gradients = by_role(models.llava(), replace(WORKLOAD, tuning="frozen"), "gradients")
    assert gradients["tower"] == 0 < gradients["layer"]


def test_checkpointing_trades_kept_activations_for_temporary_ones(way):
    """With checkpointing a layer keeps its input only, and all of it comes back while it is recomputed."""
    model = models.llama()
    case = TrainingCase.of(model, WORKLOAD)
    plain = profile(case).costs
    recomputed = profile(case.with_workload(gradient_checkpointing=True)).costs
    for block, before, after in zip(case.structure.blocks, plain, recomputed, strict=True):
        if block.role == "layer":
            assert after.activations < before.activations / 4
            assert after.backward >= before.activations


def test_logits_are_the_heads(way):
    """Logits and their loss grow with the tokens and sit with the head."""
    model = models.llama()
    activations, backward = (by_role(model, WORKLOAD, field) for field in ("activations", "backward"))
    assert activations["head"] >= LOGITS and backward["head"] >= 2 * LOGITS
    longer = by_role(model, replace(WORKLOAD, seq_len=2 * WORKLOAD.seq_len), "activations")
    assert longer["head"] == pytest.approx(2 * activations["head"], rel=0.01)


def test_what_returns_is_with_the_first_device(way):
    """The logits that come back to where the inputs were count there, whichever blocks sit there."""
    model = models.llama()
    assert profile(TrainingCase.of(model, WORKLOAD)).first.forward >= LOGITS


def test_a_tied_head_is_counted_once_before_it_is_tied(way):
    """transformers 5 ties after the device map is made; the head's own parameter is only a place-holder until then."""
    tied, untied = models.llama(tie_word_embeddings=True), models.llama()
    assert structure_of(untied).parameters - structure_of(tied).parameters == tied.lm_head.weight.numel()
    assert total(untied, WORKLOAD, "weights") - total(tied, WORKLOAD, "weights") == tied.lm_head.weight.nbytes


def test_quantized_sizes_are_what_the_quantizer_says(way):
    """`parameter_bytes` decides the weights and nothing else."""
    model = models.llama()
    halved = total(model, WORKLOAD, "weights", parameter_bytes=lambda _, tensor: tensor.nbytes / 2)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert halved - buffers == (total(model, WORKLOAD, "weights") - buffers) / 2
    assert total(model, WORKLOAD, "gradients", parameter_bytes=lambda _, tensor: 0) == total(
        model, WORKLOAD, "gradients"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_eight_bit_optimizers_keep_embeddings_in_float32(way, tied):
    """The Trainer has bitsandbytes keep the state of embeddings in full; a tied head is one of them."""
    if version_of("transformers") < SPARES_SINCE:
        pytest.skip("this version's Trainer asks for the embeddings of a class that it never makes")
    model = models.llama(tie_word_embeddings=tied)
    optimizer_state = by_role(model, replace(WORKLOAD, optimizer="adamw_bnb_8bit"), "optimizer")
    values = models.SIZES["vocab_size"] * models.SIZES["hidden_size"]
    assert optimizer_state["embedding"] == pytest.approx(0 if tied else 8 * values, abs=1)
    assert optimizer_state["head"] == pytest.approx(8 * values if tied else 2 * QUANTIZED * values, abs=1)
    assert by_role(model, replace(WORKLOAD, tuning="lora", optimizer="adamw_bnb_8bit"), "optimizer")["embedding"] == 0


def test_accumulation_and_optimizer_make_the_schedule(way):
    """How costs combine follows from the workload: gradients that stay, and a step that takes all at once."""
    model = models.llama()

    def schedule(**changes):
        return profile(TrainingCase.of(model, replace(WORKLOAD, **changes))).schedule

    assert schedule(optimizer="adamw_torch_fused") == Schedule(accumulating=False, step_at_once=False)
    assert schedule(optimizer="adamw_torch", accumulation=2) == Schedule(accumulating=True, step_at_once=True)


def test_the_method_says_what_was_traced_and_why_not(way):
    """A profile that is not traced says so, with the reason."""
    model_profile = profile(TrainingCase.of(models.llama(), WORKLOAD))
    expected = {"traced": "traced", "formula": "estimated by a formula, because this test says so"}
    assert model_profile.method == expected[way]


def test_the_formula_knows_roles():
    """Embeddings keep nothing, heads their logits, layers the outputs of their linear layers; adapters are layers'."""
    model = models.llama()
    parameters = dict(model.named_parameters())
    for block in chain(model):
        own = [parameters[name] for name in block.parameters]
        guess, adapters = estimate.activations(block, own, WORKLOAD), estimate.adapter_values(block, own)
        assert (adapters > 0) == (block.role == "layer")
        if block.role == "layer":
            outputs = sum(parameter.shape[0] for parameter in own if parameter.dim() == 2)
            assert guess.kept > WORKLOAD.tokens * outputs * torch.float32.itemsize
        else:
            assert guess.kept == (LOGITS if block.role == "head" else 0)
