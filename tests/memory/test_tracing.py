"""Traces of real model classes: that they are had, that they leave no trace, and that they measure what is there."""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers

from balance_shim.memory.structure import structure_of
from balance_shim.memory.tracing import layers
from balance_shim.memory.tracing.machine import traced, tracing
from balance_shim.memory.workload import Workload
from balance_shim.versions import version_of
from tests import models
from tests.memory.traced_costs import HIDDEN, TEXT, WORKLOAD, costs_of, nothing_changes, profiled, total


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", models.ALL)
def test_real_classes_are_traced_and_left_as_they_were(name, tuning):
    """Each small model is traced, all but the remote stand-in as a whole; neither it nor torch notices."""
    if tuning == "lora":
        pytest.importorskip("peft")
    model = models.ALL[name]()
    with nothing_changes(model):
        _, model_profile = profiled(model, replace(WORKLOAD, tuning=tuning))
    assert model_profile.method.startswith("traced block by block, because" if name in IN_PARTS else "traced"), (
        model_profile.method
    )
    assert name in IN_PARTS or model_profile.method == "traced"


# The stand-in has no forward of its own.
IN_PARTS = {"internvl-remote"}
CHANGES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "autocast": {"autocast": True},
    "accumulation": {"accumulation": 2},
}
TOWERS = {"qwen-vl", "llava"} & set(models.ALL)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=f"{name}-{kind}")
        for name in models.ALL
        for kind, changes in ({"plain": {}, "frozen": {"tuning": "frozen"}} if name in TOWERS else CHANGES).items()
        if name != "internvl-remote"
    ],
)
def test_a_sample_of_the_layers_stands_for_all(name, changes, monkeypatch):
    """Tracing each distinct layer once gives the very figures of a trace that runs all of them."""
    model, workload = models.ALL[name](), replace(WORKLOAD, **changes)
    blocks, sampled = profiled(model, workload)
    monkeypatch.setattr(layers, "sample", lambda _, structure: layers.everything(structure.blocks))
    full = profiled(model, workload)[1]
    last = [block.name for block in blocks if block.role == "layer"][-1]
    for block, one, other in zip(blocks, sampled.costs, full.costs, strict=True):
        if block.name == last and workload.gradient_checkpointing:
            # Under 4.x's re-entrant checkpointing what a layer keeps is the next one's input, which the last has not.
            assert 0 <= one.activations - other.activations <= HIDDEN
            one = replace(one, activations=other.activations)
        assert one == other, block.name
    assert sampled.first == full.first


@pytest.mark.skipif(version_of("transformers") < (5,), reason="4.51's fails across devices, and falls to the formula")
def test_pictures_of_qwen2_vl_are_traced():
    """Its batch needs more than pixels: with that the whole model runs, its tower too."""
    model = models.qwen2_vl()
    blocks, model_profile = profiled(model)
    assert model_profile.method == "traced"
    activations = {block.name: cost.activations for block, cost in zip(blocks, model_profile.costs, strict=True)}
    assert all(activations[name] > 0 for name in activations if ".blocks." in name or name.endswith("patch_embed"))


def test_not_all_layers_run():
    """Of six like layers three run, however many there are: two, and the one behind them."""
    for count in (6, 40):
        model = models.llama(num_hidden_layers=count)
        sample = layers.sample(model, structure_of(model))
        assert len(sample.left_out) == count - 3
        assert sample.speaks_for[f"model.layers.{count - 1}"] == "model.layers.1"
        assert not sample.whole


def moe_with_dense_layers():
    """Return a model whose first and fourth layer are dense."""
    config = transformers.Qwen2MoeConfig(
        **TEXT, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[0, 3],
    )  # fmt: skip
    return models.on_meta(transformers.Qwen2MoeForCausalLM, config)


def test_dense_and_expert_layers_are_measured_each(monkeypatch):
    """Layers of one class with other modules in them have figures of their own."""
    costs = costs_of(moe_with_dense_layers())
    dense, experts = ([costs[f"model.layers.{number}"] for number in those] for those in ((0, 3), (1, 2, 4, 5)))
    assert len({(cost.weights, cost.activations) for cost in dense}) == 1
    assert len({(cost.weights, cost.activations) for cost in experts}) == 1
    assert dense[0].weights != experts[0].weights and dense[0].activations != experts[0].activations
    monkeypatch.setattr(layers, "sample", lambda _, structure: layers.everything(structure.blocks))
    full = costs_of(moe_with_dense_layers())
    assert [cost.activations for cost in full.values()] == [cost.activations for cost in costs.values()]


def sliding_and_full(**changes):
    config = transformers.Gemma2Config(**TEXT, head_dim=16, sliding_window=16, **changes)
    return models.on_meta(transformers.Gemma2ForCausalLM, config)


def test_sliding_and_full_attention_are_kinds_of_their_own():
    """Layers that differ only by the name that the config has for them are not taken for alike."""
    model = sliding_and_full()
    sample = layers.sample(model, structure_of(model))
    speakers = [sample.speaks_for[f"model.layers.{number}"] for number in range(6)]
    assert speakers[1] != speakers[2] and speakers[2::2] == speakers[2:3] * 2 and speakers[3::2] == speakers[3:4] * 2
    costs_of(model)


def test_tied_ends_are_counted_once():
    """The gradient and state of a tied embedding are there once, with the head, and its backward is traced so."""
    tied, untied = costs_of(models.llama(tie_word_embeddings=True)), costs_of(models.llama())
    size = models.SIZES["vocab_size"] * models.SIZES["hidden_size"] * 4
    for term in ("weights", "gradients"):
        assert total(untied, term) - total(tied, term) == size
    assert tied["model.embed_tokens"].gradients == 0 < tied["lm_head"].gradients


def test_a_frozen_tower_keeps_nothing():
    """Nothing runs backward through what stands before all that trains, so that it need not be kept."""
    full, frozen = (costs_of(models.qwen_vl(), replace(WORKLOAD, tuning=tuning)) for tuning in ("full", "frozen"))
    tower = [name for name in full if "visual.blocks" in name]
    assert tower and all(frozen[name].gradients == 0 < full[name].gradients for name in tower)
    assert sum(frozen[name].activations for name in tower) < sum(full[name].activations for name in tower) / 10
    assert frozen["lm_head"] == full["lm_head"]


def falcon():
    """Its linear layers are of a class of its own."""
    config = transformers.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    return transformers.FalconForCausalLM(config)


@pytest.mark.parametrize("make", [models.ALL["llama"], models.ALL["gpt2"], models.ALL["mixtral"], falcon])
def test_supposed_adapters_are_those_that_peft_makes(make):
    """What LoRA is supposed to take is what the same adapters take when PEFT has put them in."""
    peft = pytest.importorskip("peft")
    model = make()
    blocks, supposed = profiled(model, replace(WORKLOAD, tuning="lora"))
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    targets = [
        inner for inner, module in model.named_modules() if isinstance(module, linear) and "lm_head" not in inner
    ]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets)).base_model.model
    real_blocks, real = profiled(applied, trains=lambda _, parameter: parameter.requires_grad)
    assert supposed.method == real.method == "traced"
    for block, one, other, real_block in zip(blocks, supposed.costs, real.costs, real_blocks, strict=True):
        assert block.name == real_block.name
        assert replace(one, weights=0) == replace(other, weights=0), block.name
    assert sum(cost.gradients for cost in supposed.costs) > 0


def test_checkpointing_keeps_less_and_computes_it_again():
    """A recomputed layer keeps about its input; all that it kept otherwise is there while it runs backward."""
    model = models.llama()
    plain, recomputed = costs_of(model), costs_of(model, replace(WORKLOAD, gradient_checkpointing=True))
    layer = "model.layers.3"
    assert HIDDEN <= recomputed[layer].activations < 2 * HIDDEN < plain[layer].activations / 4
    assert recomputed[layer].backward >= plain[layer].activations
    assert recomputed["lm_head"] == plain["lm_head"]


def test_autocast_halves_what_linear_layers_keep():
    """In mixed precision a layer keeps less, but for the weights in the lower type; logits come back in float32."""
    model = models.llama(intermediate_size=512)
    plain, mixed = (costs_of(model, Workload(8, 512, autocast=autocast)) for autocast in (False, True))
    part = mixed["model.layers.3"].activations / plain["model.layers.3"].activations
    assert 0.4 < part < 0.75
    assert total(mixed, "gradients") == total(plain, "gradients")


def test_attention_is_cast_under_autocast():
    """Queries and keys are float32 after rotary embeddings; attention keeps them in the lower type, as on devices."""
    with tracing(1) as machine, torch.autocast("cpu", dtype=torch.bfloat16):
        heads = [traced(torch.zeros(1, 2, 8, 16), 0, machine).requires_grad_() for _ in range(3)]
        assert torch.nn.functional.scaled_dot_product_attention(*heads).dtype is torch.bfloat16


def test_dropout_keeps_a_byte_a_value():
    """Fused dropout keeps truth values; the CPU's own would keep noise as wide as the input."""
    with tracing(1) as machine:
        values = traced(torch.zeros(1024), 0, machine).requires_grad_()
        before = machine.ledger.live(0)
        out = torch.nn.Dropout(0.5)(values)
        assert machine.ledger.live(0) - before == out.nbytes + 1024
        out.sum().backward()
    assert values.grad.shape == values.shape


def test_accumulation_leaves_gradients_out_of_backward():
    """Where gradients of earlier micro-batches exist, backward does not bring them; what is kept stays the same."""
    model = models.llama()
    plain, accumulated = costs_of(model), costs_of(model, replace(WORKLOAD, accumulation=2))
    layer = "model.layers.3"
    assert plain[layer].activations == accumulated[layer].activations
    # Less than all of them, because the moment when most is there is not the last one.
    assert 0 < plain[layer].backward - accumulated[layer].backward <= plain[layer].gradients


def pictures(count, side, tokens=64):
    """Return a batch with a picture of `side` x `side` patches in each row, four patches a token."""
    ids = torch.randint(5, 400, (count, tokens))
    ids[:, 1 : 1 + side * side // 4] = models.qwen_vl().config.image_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["pixel_values"] = torch.zeros(count * side * side, 3 * 2 * 14 * 14)
    batch["image_grid_thw"] = torch.tensor([[1, side, side]] * count)
    if version_of("transformers") >= (5, 0):
        batch["mm_token_type_ids"] = (ids == models.qwen_vl().config.image_token_id).long()
    return batch


def test_the_real_batch_decides():
    """What the collator gives is what is traced: larger pictures cost the tower more, none cost it nothing."""
    model = models.qwen_vl()
    trained = {"trains": lambda *_: True}
    small, large = (costs_of(model, **trained, batch=pictures(2, side)) for side in (4, 8))
    tower = "model.visual.blocks.1" if "model.visual.blocks.1" in small else "visual.blocks.1"
    assert large[tower].activations > 3 * small[tower].activations
    language = next(name for name in small if name.endswith("layers.1") and "visual" not in name)
    assert large[language].activations == small[language].activations
    text = {
        name: tensor for name, tensor in pictures(2, 4).items() if name in ("input_ids", "attention_mask", "labels")
    }
    text["input_ids"].fill_(5)
    _, model_profile = profiled(model, **trained, batch=text)
    assert "which the trace does not reach" in model_profile.method and "visual" in model_profile.method
    longer = costs_of(models.llama(), batch={name: tensor.repeat(1, 2) for name, tensor in text.items()})
    shorter = costs_of(models.llama(), batch=text)
    assert longer["lm_head"].activations == pytest.approx(2 * shorter["lm_head"].activations, rel=0.01)


def test_label_smoothing_of_an_encoder_decoder_is_traced():
    """The labels go to the Trainer's loss, so the decoder gets what the collator makes of them."""
    _, model_profile = profiled(models.t5(), replace(WORKLOAD, label_smoothing=0.1))
    assert model_profile.method == profiled(models.t5())[1].method
