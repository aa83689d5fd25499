"""Traces of real model classes: that they are had, that they leave no trace, and that they measure what is there."""

import inspect
import logging
import random
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy
import pytest
import torch
import transformers

from balance_shim.memory.blocks import chain
from balance_shim.memory.profile import profile
from balance_shim.memory.tracing import layers, machine
from balance_shim.memory.tracing.machine import TracedTensor, traced, tracing
from balance_shim.memory.tracing.measure import trace
from balance_shim.memory.workload import Workload
from balance_shim.seams.loss_device import computes_loss_on_first_device
from balance_shim.versions import version_of
from tests import models

WORKLOAD = Workload(batch_size=2, seq_len=64)
HIDDEN = WORKLOAD.tokens * models.SIZES["hidden_size"] * 4  # bytes
TEXT = {**models.SIZES, "num_key_value_heads": 2}


def profiled(model, workload=WORKLOAD, **options):
    """Return (blocks, profile) as the planner asks for it."""
    blocks = chain(model)
    first = computes_loss_on_first_device(model)
    return blocks, profile(model, blocks, workload, loss_on_first=first, **options)


def costs_of(model, workload=WORKLOAD, **options):
    blocks, found = profiled(model, workload, **options)
    assert found.method == "traced"
    return dict(zip((block.name for block in blocks), found.costs, strict=True))


def total(costs, term):
    return sum(getattr(cost, term) for cost in costs.values())


@contextmanager
def nothing_changes(model):
    """Fail if what is within changes `model` or torch."""

    def state():
        functions = torch.nn.functional
        return (
            [(name, id(each), each.is_meta, each.requires_grad) for name, each in model.named_parameters()],
            [(name, id(each)) for name, each in model.named_buffers()],
            [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
            [
                len(hooks)
                for module in model.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            ],
            (functions.scaled_dot_product_attention, functions.dropout, torch.tensor),
            (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
            torch.get_rng_state().tolist(),
            (random.getstate(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]),
            getattr(getattr(model, "config", None), "use_cache", None),
        )

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", models.ALL)
def test_real_classes_are_traced_and_left_as_they_were(name, tuning):
    """Each small model is traced, all but the remote stand-in as a whole; neither it nor torch notices."""
    if tuning == "lora":
        pytest.importorskip("peft")
    model = models.ALL[name]()
    with nothing_changes(model):
        _, found = profiled(model, replace(WORKLOAD, tuning=tuning))
    assert found.method.startswith("traced in parts, because" if name in IN_PARTS else "traced"), found.method
    assert name in IN_PARTS or found.method == "traced"


# The stand-in has no forward of its own; the masks with which 4.x puts pictures in their places do not run on shapes.
IN_PARTS = {"internvl-remote"} | ({"llava"} if version_of("transformers") < (5, 0) else set())


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
    monkeypatch.setattr(layers, "sample", lambda _, blocks: layers.everything(blocks))
    whole = profiled(model, workload)[1]
    last = [block.name for block in blocks if block.role == "layer"][-1]
    for block, one, other in zip(blocks, sampled.costs, whole.costs, strict=True):
        if block.name == last and workload.gradient_checkpointing:
            # Under 4.x's re-entrant checkpointing what a layer keeps is the next one's input, which the last has not.
            assert 0 <= one.activations - other.activations <= HIDDEN
            one = replace(one, activations=other.activations)
        assert one == other, block.name
    assert sampled.first == whole.first


@pytest.mark.skipif(version_of("transformers") < (5,), reason="4.51's fails across devices, and falls to the formula")
def test_pictures_of_qwen2_vl_are_traced():
    """Its batch needs more than pixels: with that the whole model runs, its tower too."""
    model = models.qwen2_vl()
    blocks, found = profiled(model)
    assert found.method == "traced"
    kept = {block.name: cost.activations for block, cost in zip(blocks, found.costs, strict=True)}
    assert all(kept[name] > 0 for name in kept if ".blocks." in name or name.endswith("patch_embed"))


def test_not_all_layers_run():
    """Of six like layers three run, however many there are: two, and the one behind them."""
    for count in (6, 40):
        model = models.llama(num_hidden_layers=count)
        sample = layers.sample(model, chain(model))
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
    monkeypatch.setattr(layers, "sample", lambda _, blocks: layers.everything(blocks))
    whole = costs_of(moe_with_dense_layers())
    assert [cost.activations for cost in whole.values()] == [cost.activations for cost in costs.values()]


def sliding_and_full(**changes):
    config = transformers.Gemma2Config(**TEXT, head_dim=16, sliding_window=16, **changes)
    return models.on_meta(transformers.Gemma2ForCausalLM, config)


def test_sliding_and_full_attention_are_kinds_of_their_own():
    """Layers that differ only by the name that the config has for them are not taken for alike."""
    model = sliding_and_full()
    sample = layers.sample(model, chain(model))
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
        found = costs_of(placed)
    assert hooked == [name for name, module in placed.named_modules() if hasattr(module, "_hf_hook")]
    assert found == expected


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


def behaving(model, act):
    """Return `model` with a forward pass of a class of its own, which calls `act` first."""
    original = type(model).forward

    class Behaving(type(model)):
        def forward(self, *args, **kwargs):
            act()
            return original(self, *args, **kwargs)

    Behaving.forward.__signature__ = inspect.signature(original)
    model.__class__ = Behaving
    return model


def test_random_numbers_of_a_trace_are_not_missing_afterwards():
    """A model that draws from Python or numpy (layers dropped at random) draws the same in training, traced or not."""
    model = behaving(models.llama(), lambda: (random.random(), numpy.random.rand(), torch.rand(1)))
    with nothing_changes(model):
        assert profiled(model)[1].method == "traced"


def test_a_model_that_ends_the_program_is_estimated():
    """A forward pass that exits, as some do over inputs that they do not like, does not end the program in a trace."""
    _, found = profiled(behaving(models.llama(), lambda: sys.exit("no such task")))
    assert found.method.startswith("estimated by a formula, because") and "no such task" in found.method


def test_a_model_that_takes_too_long_is_estimated(monkeypatch):
    """A loop over all tokens would be minutes of tracing: it is given up once, and nothing else is tried."""
    monkeypatch.setattr(machine, "MOST_OPERATIONS", 5000)
    calls = []

    def loop():
        calls.append(1)
        value = torch.zeros(4, device="cpu:1")
        for _ in range(6000):
            value = value + 1

    _, found = profiled(behaving(models.llama(), loop))
    assert found.method.startswith("estimated by a formula, because") and "takes too long" in found.method
    assert len(calls) == 1


def test_a_batch_that_the_host_could_not_hold_is_not_made():
    """Numbers of tokens beyond anything are planned for by a formula; making such a batch would end the program."""
    _, found = profiled(models.llama(), Workload(batch_size=10**6, seq_len=10**6))
    assert found.method.startswith("estimated by a formula, because 1000000 x 1000000 tokens")


def test_layers_with_a_part_in_common_are_traced_all():
    """What layers hold together counts with the last of them, which speaks for no other one."""
    model = models.llama()
    rows = model.model.layers
    rows[4].mlp = rows[1].mlp
    found = layers.sample(model, chain(model))
    assert not found.left_out & {"model.layers.1", "model.layers.4"}
    assert "model.layers.4" not in (found.speaks_for["model.layers.3"], found.speaks_for["model.layers.5"])


def test_what_is_said_once_is_still_to_be_said():
    """What transformers says once in a process is not used up by a trace, in which nobody hears it."""
    logger, heard = transformers.utils.logging.get_logger("transformers.test"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    model = behaving(models.llama(), lambda: logger.warning_once("eager attention is used"))
    assert profiled(model)[1].method == "traced" and not heard
    logger.warning_once("eager attention is used")
    assert heard == ["eager attention is used"]


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
    assert not calls and all(each.grad is None for each in model.parameters())


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
        _, found = profiled(model)
    assert found.method.startswith("estimated by a formula, because") and "this holds a lock" in found.method
    assert all(cost.gradients for cost in found.costs if cost.weights > 1000)


def test_a_model_that_fails_is_estimated_with_the_reason(monkeypatch):
    """A forward pass that raises leaves the model and torch as they were, and gives estimates with its reason."""
    model = models.llama()
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", broken_forward)
    with nothing_changes(model):
        _, found = profiled(model)
    assert found.method.startswith("estimated by a formula, because") and "no such thing" in found.method
    monkeypatch.undo()
    costs_of(model)  # and the next one is traced again


def pictures(rows, side, tokens=64):
    """Return a batch with a picture of `side` x `side` patches in each row, four patches a token."""
    ids = torch.randint(5, 400, (rows, tokens))
    ids[:, 1 : 1 + side * side // 4] = models.qwen_vl().config.image_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["pixel_values"] = torch.zeros(rows * side * side, 3 * 2 * 14 * 14)
    batch["image_grid_thw"] = torch.tensor([[1, side, side]] * rows)
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
    text = {name: each for name, each in pictures(2, 4).items() if name in ("input_ids", "attention_mask", "labels")}
    text["input_ids"].fill_(5)
    _, found = profiled(model, **trained, batch=text)
    assert "which that does not reach" in found.method and "visual" in found.method
    longer = costs_of(models.llama(), batch={name: each.repeat(1, 2) for name, each in text.items()})
    shorter = costs_of(models.llama(), batch=text)
    assert longer["lm_head"].activations == pytest.approx(2 * shorter["lm_head"].activations, rel=0.01)


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
    found = trace(model, chain(model), WORKLOAD)
    assert not any(isinstance(each, TracedTensor) for trained in found.trained.values() for each in trained)


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
    assert profile(model, chain(model), Workload(seq_len=64)).method == "traced"
    heard = capfd.readouterr()
    assert "a picture!" not in heard.out and "a warning!" not in heard.err
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def test_label_smoothing_of_an_encoder_decoder_is_traced():
    """The labels go to the Trainer's loss, so the decoder gets what the collator makes of them."""
    _, found = profiled(models.t5(), replace(WORKLOAD, label_smoothing=0.1))
    assert found.method == profiled(models.t5())[1].method


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
