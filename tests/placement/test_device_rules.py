"""Plans follow the kernels of the devices that they are for."""

from dataclasses import replace

import torch
import transformers

from balance_shim.device import describe
from balance_shim.device_rules.kinds import DEFAULT_ARCHITECTURE, kind_named
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.plan import evaluate
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from balance_shim.units import MIB
from tests import models

T4 = kind_named("T4").architecture


def request_for(dtype, *architectures, **changes):
    config = transformers.LlamaConfig(**models.SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    machine = tuple(
        describe(index, f"cuda:{index}", 64 * MIB, Settings(), architecture)
        for index, architecture in enumerate(architectures)
    )
    model = models.on_meta(transformers.LlamaForCausalLM, config).to(dtype)
    return replace(Request(TrainingCase.of(model, Workload(seq_len=256)), machine), **changes)


def layer_of(costed):
    return next(
        cost.activations for block, cost in zip(costed.blocks, costed.costs, strict=True) if block.role == "layer"
    )


def notes_of(request, costed):
    places = {block.name: 0 for block in costed.blocks}
    return [note for note in evaluate("map", costed, places, request.devices).notes if note.startswith("attention")]


def test_attention_without_a_fused_kernel_counts_and_is_told():
    """bfloat16 before 8.0: the matrix of S x S values of each head in float32, a note, and what would avoid it."""
    new, old = (request_for(torch.bfloat16, architecture) for architecture in (DEFAULT_ARCHITECTURE, T4))
    fused, plain = planner.cost(new), planner.cost(old)
    heads = new.model.config.num_attention_heads
    assert layer_of(plain) - layer_of(fused) > heads * 256 * 256 * 4
    assert fused.math_attention == () and notes_of(new, fused) == []
    assert plain.math_attention == ("bfloat16",)
    (note,) = notes_of(old, plain)
    assert "bfloat16" in note and "7.5" in note and "float16 or another attn_implementation" in note


def test_repeated_keys_and_values_save_it():
    """float32 with grouped queries: a plan counts with them for what the shim places, and without for the library's."""
    placed = request_for(torch.float32, DEFAULT_ARCHITECTURE)
    alone = replace(placed, repeats_grouped_keys=False)
    costed, costed_alone = planner.cost(placed), planner.cost(alone)
    groups_are_asked_for = hasattr(transformers.integrations.sdpa_attention, "use_gqa_in_sdpa")
    assert costed.repeats_grouped_keys == groups_are_asked_for and not costed_alone.repeats_grouped_keys
    assert costed.math_attention == () and costed_alone.math_attention == (("float32",) if groups_are_asked_for else ())
    assert (layer_of(costed) < layer_of(costed_alone)) == groups_are_asked_for


def test_mixed_machines_count_the_costliest_kernel(tmp_path):
    """A block may land on any device; what is kept on disk is for these architectures and no others."""
    mixed = request_for(torch.bfloat16, DEFAULT_ARCHITECTURE, T4, cache=tmp_path)
    old, new = (
        request_for(torch.bfloat16, architecture, cache=tmp_path) for architecture in (T4, DEFAULT_ARCHITECTURE)
    )
    assert layer_of(planner.cost(mixed)) == layer_of(planner.cost(old)) > layer_of(planner.cost(new))
    assert len({request.key("profile") for request in (mixed, old, new)}) == 3
    assert new.key("profile") == request_for(torch.bfloat16, *[DEFAULT_ARCHITECTURE] * 2, cache=tmp_path).key("profile")
