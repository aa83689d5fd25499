"""The first estimate: exact where it can be, and moving the right way elsewhere."""

from dataclasses import replace

import pytest
import torch

from balance_shim.memory.blocks import chain
from balance_shim.memory.estimate import estimate
from balance_shim.memory.ties import parameter_count
from balance_shim.memory.workload import Workload
from tests import models

WORKLOAD = Workload(batch_size=2, seq_len=64)


def total(model, workload, field, **options):
    blocks = chain(model)
    return sum(getattr(cost, field) for cost in estimate(model, blocks, workload, **options))


@pytest.mark.parametrize("name", models.ALL)
def test_weights_and_adam_state_are_counted_exactly(name):
    """Weights, gradients and AdamW state add up to the model's own bytes, tied weights counted once."""
    model = models.ALL[name]()
    parameters = parameter_count(model) * torch.float32.itemsize
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert total(model, WORKLOAD, "weights") == parameters + buffers
    assert total(model, WORKLOAD, "gradients") == parameters
    assert total(model, WORKLOAD, "optimizer") == 2 * parameters


def test_what_trains_decides():
    """LoRA and plain SGD leave little or nothing of gradients and optimizer state."""
    model = models.llama()
    full = total(model, WORKLOAD, "gradients")
    assert total(model, replace(WORKLOAD, tuning="lora"), "gradients") < full
    assert total(model, replace(WORKLOAD, optimizer="sgd"), "optimizer") == 0
    head_only = total(model, WORKLOAD, "gradients", trains=lambda name, _: name.startswith("lm_head"))
    assert head_only == model.lm_head.weight.numel() * model.lm_head.weight.element_size()


def test_a_frozen_tower_has_no_gradients():
    """Tuning "frozen" trains everything but the tower."""
    model = models.llava()
    blocks = chain(model)
    costs = estimate(model, blocks, replace(WORKLOAD, tuning="frozen"))
    by_role = {}
    for block, cost in zip(blocks, costs, strict=True):
        by_role[block.role] = by_role.get(block.role, 0) + cost.gradients
    assert by_role["tower"] == 0 < by_role["layer"]


def test_checkpointing_trades_kept_activations_for_temporary_ones():
    """With checkpointing a layer keeps its input only, and all of it comes back while it is recomputed."""
    model = models.llama()
    plain = dict(zip(chain(model), estimate(model, chain(model), WORKLOAD), strict=True))
    recomputed = estimate(model, chain(model), replace(WORKLOAD, gradient_checkpointing=True))
    for (block, before), after in zip(plain.items(), recomputed, strict=True):
        if block.role == "layer":
            assert after.activations < before.activations and after.temporary == before.activations


def test_logits_are_the_heads():
    """Logits and their loss grow with the tokens and sit with the head."""
    model = models.llama()
    blocks = chain(model)
    costs = dict(zip((block.role for block in blocks), estimate(model, blocks, WORKLOAD), strict=True))
    logits = WORKLOAD.tokens * models.SIZES["vocab_size"]
    assert costs["head"].activations == logits * torch.float32.itemsize
    assert costs["head"].temporary >= 2 * costs["head"].activations


def test_a_tied_head_is_counted_once_before_it_is_tied():
    """transformers 5 ties after the device map is made; the head's own parameter is only a place-holder until then."""
    tied, untied = models.llama(tie_word_embeddings=True), models.llama()
    assert parameter_count(untied) - parameter_count(tied) == tied.lm_head.weight.numel()
    assert total(untied, WORKLOAD, "weights") - total(tied, WORKLOAD, "weights") == tied.lm_head.weight.nbytes
