"""Mode balanced on real model classes."""

from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balance_shim.device import Device, describe, levelled
from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import Schedule
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.balance import (
    WORTH_LEAVING_FIRST_DEVICE,
    DoesNotFit,
    balance,
)
from balance_shim.placement.chain import chain_of
from balance_shim.placement.costed_model import lower_bound
from balance_shim.placement.layouts import WORTH_A_CROSSING
from balance_shim.placement.places import device_of
from balance_shim.placement.plan import collapse, evaluate
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from balance_shim.upstream.loss_device import computes_loss_on_first_device
from tests import models

MIB = 1 << 20


def machine(*sizes):
    return tuple(describe(index, f"cuda:{index}", size, Settings()) for index, size in enumerate(sizes))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", models.ALL)
def test_every_tensor_gets_a_device_and_ties_hold(name, devices):
    """The map covers every parameter and buffer, keeps ties together and uses existing devices only."""
    model = models.ALL[name]()
    costed = planner.cost(Request(TrainingCase.of(model, Workload(seq_len=64))))
    device_map = balance(costed, machine(*[64 * MIB] * devices))
    for tensor in [*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())]:
        assert device_of(tensor, device_map) in range(devices)
    for group in costed.structure.ties:
        assert len({device_of(tensor, device_map) for tensor in group}) == 1


def layers_of(choice):
    """Return the map of the six layers of `models.llama()`, cut at the positions in `choice`."""
    return {f"model.layers.{layer}": sum(layer >= cut for cut in choice) for layer in range(6)}


@pytest.mark.parametrize("workload", [Workload(seq_len=64), Workload(seq_len=256, accumulation=2)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_worst_device_is_below_that_of_any_other_map_of_whole_layers(tied, workload):
    """No way of cutting the layers, with any host for the head, has a lower fullest device worth a crossing.

    With the embedding away from the first device none is lower by what is worth leaving it.
    """
    model = models.llama(tie_word_embeddings=tied, vocab_size=256)
    costed = planner.cost(Request(TrainingCase.of(model, workload)))
    devices = machine(8 * MIB, 8 * MIB, 16 * MIB)
    balanced = evaluate("balanced", costed, balance(costed, devices), devices).worst.filled
    for choice in combinations_with_replacement(range(7), 2):
        device_map = layers_of(choice)
        for embedding, head in product(range(3), repeat=2):
            if tied and embedding != head:
                continue
            ends = {"model.embed_tokens": embedding, "model.rotary_emb": embedding, "model.norm": head, "lm_head": head}
            other = evaluate("balanced", costed, {**device_map, **ends}, devices)
            away = WORTH_LEAVING_FIRST_DEVICE if embedding else 0
            assert balanced * (1 - WORTH_A_CROSSING) * (1 - away) <= other.worst.filled * (1 + 1e-9)


@pytest.mark.parametrize(("larger", "leaves"), [(1.01, False), (100, True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "llava"])
def test_the_embedding_leaves_the_first_device_only_where_that_is_worth_it(name, larger, leaves):
    """A first device that is smaller by 1 % keeps the embedding; one that it would fill to the brim does not."""
    # On 4.x Llava computes its loss, and so keeps its head, on the first device, which is another reason.
    case = TrainingCase.of(models.ALL[name](), Workload(seq_len=64), loss_on_first=False)
    costed = planner.cost(Request(case))
    first_device = costed.structure.entry
    # Half of the bytes are in the embedding, so that a small first device cannot have it without being the fullest.
    costs = [
        BlockCost(
            weights=256 * MIB // len(first_device) if block.name in first_device else 256 * MIB // len(costed.blocks)
        )
        for block in costed.blocks
    ]
    costed = replace(costed, costs=tuple(costs), records=(), first_record=None, first=BlockCost())
    sizes = [512 * MIB, *[int(larger * 512 * MIB)] * 3]
    devices = tuple(Device(index, f"cuda:{index}", size, size, 0) for index, size in enumerate(sizes))
    device_map = balance(costed, devices)
    assert first_device and ({device_map[block_name] for block_name in first_device} == {0}) is not leaves
    plan = evaluate("balanced", costed, device_map, devices)
    pinned = replace(costed, constraints=costed.constraints.with_met(first_device | {None}))
    on_first_device = evaluate("balanced", pinned, balance(pinned, devices), devices)
    assert (plan.worst.filled <= on_first_device.worst.filled * (1 - WORTH_LEAVING_FIRST_DEVICE)) is leaves


@pytest.mark.parametrize("tied", [True, False])
def test_ends_that_are_tied_are_one_group(tied):
    """Embedding and head may sit anywhere: each on its own, or together where they are one tensor."""
    chain = chain_of(
        planner.cost(Request(TrainingCase.of(models.llama(tie_word_embeddings=tied), Workload(seq_len=64)))),
        whole_tower=True,
    )
    names = [
        ([block.name for link in group.ahead for block in link.blocks], [link.blocks[0].name for link in group.behind])
        for group in chain.groups
    ]
    embedding, head = ["model.embed_tokens", "model.rotary_emb"], ["model.norm", "lm_head"]
    assert names == ([(embedding, head)] if tied else [(embedding, []), ([], head)])
    assert all(group.must_leave == tied for group in chain.groups)
    assert len(chain.without(chain.groups)) == models.SIZES["num_hidden_layers"]


@pytest.mark.parametrize("name", models.ALL)
def test_the_chain_holds_each_block_once(name):
    """Joining blocks to links, by ties and towers and followers, loses and repeats none, and no cost either."""
    costed = planner.cost(Request(TrainingCase.of(models.ALL[name](), Workload(seq_len=64))))
    chain = chain_of(costed, whole_tower=True)
    held = [block.name for link in chain.links for block in link.blocks]
    assert sorted(held) == sorted(block.name for block in costed.blocks)
    for term in ("weights", "gradients", "optimizer"):
        assert sum(getattr(link.cost, term) for link in chain.links) == sum(
            getattr(cost, term) for cost in costed.costs
        )
    copies = sum(size for cost in costed.costs for _, size in cost.takes)  # of which a link needs fewer
    apart = sum(cost.activations for cost in costed.costs)
    assert apart - copies <= sum(link.cost.activations for link in chain.links) <= apart


COSTS = st.builds(
    lambda weights, gradients, activations, temporary, step: BlockCost(
        weights=weights, gradients=gradients, optimizer=2 * gradients, activations=activations,
        forward=activations + temporary, backward=activations + temporary + gradients, step=step,
    ),
    *[st.integers(0, 50)] * 5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=6), st.lists(st.integers(100, 300), min_size=1, max_size=3), st.data())
def test_no_map_goes_below_the_lower_bound(costs, capacities, data):
    """Neither one in a row nor any other, on devices of any sizes."""
    schedule = Schedule(accumulating=data.draw(st.booleans()), step_at_once=data.draw(st.booleans()))
    some = planner.cost(Request(TrainingCase.of(models.llama(), Workload(seq_len=64))))
    structure = replace(some.structure, blocks=some.blocks[: len(costs)])
    costed = replace(some, structure=structure, costs=tuple(costs), schedule=schedule, first=BlockCost())
    devices = tuple(Device(index, f"cuda:{index}", size, size, 7) for index, size in enumerate(capacities))
    maps = product(range(len(devices)), repeat=len(costs))
    plans = [
        evaluate("map", costed, {b.name: p for b, p in zip(costed.blocks, places, strict=True)}, devices)
        for places in maps
    ]
    least = min(plan.worst.filled for plan in plans) * max(capacities)
    assert plans[0].lower_bound <= least * (1 + 1e-9)


def test_the_lower_bound_knows_of_whole_blocks():
    """Of ten equal blocks one of four devices holds three, though a quarter of all is two and a half."""
    some = planner.cost(Request(TrainingCase.of(models.llama(num_hidden_layers=7), Workload(seq_len=64))))
    layer = BlockCost(weights=1000)
    costed = replace(some, structure=replace(some.structure, blocks=some.blocks[:10]), costs=(layer,) * 10)
    devices = tuple(Device(index, f"cuda:{index}", 5000, 5000, 7) for index in range(4))
    assert lower_bound(costed, devices) == 3007


def test_a_tower_is_split_only_where_that_is_worth_it():
    """Vision blocks are on one device while that costs little, and spread where the tower would fill its device."""

    def worst_and_homes(tower_share):
        costed = planner.cost(Request(TrainingCase.of(models.llava(), Workload(seq_len=64))))
        total, devices = 16 << 30, machine(*[40 << 30] * 2)
        tower = [block for block in costed.blocks if block.role == "tower"]
        even = BlockCost(weights=int(tower_share * total / len(tower)))
        rest = BlockCost(weights=int((1 - tower_share) * total / (len(costed.blocks) - len(tower))))
        costed = replace(costed, costs=tuple(even if block.role == "tower" else rest for block in costed.blocks))
        device_map = balance(costed, devices)
        homes = {device for name, device in device_map.items() if "vision_tower" in name}
        return evaluate("balanced", costed, device_map, devices).worst.predicted_peak, homes, total

    _, homes, _ = worst_and_homes(0.3)
    assert len(homes) == 1
    worst, homes, total = worst_and_homes(0.8)
    assert len(homes) == 2 and worst < 0.7 * total


class Tree(torch.nn.Module):
    """A module of any shape, with tensors of its own and of its children."""

    def __init__(self, shape, shared):
        super().__init__()
        direct, listed, children = shape
        for number in range(direct):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.empty(number + 1, 8)))
            self.register_buffer(f"buffer{number}", torch.empty(number + 1), persistent=number % 2 == 0)
        if listed:
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 4 * size) for size in listed)
        self.tied = torch.nn.Linear(8, 8)
        if shared is not None and direct % 2:
            self.tied.weight = shared
        for number, child in enumerate(children):
            self.add_module(f"child{number}", Tree(child, self.tied.weight))


SHAPES = st.recursive(
    st.tuples(st.integers(0, 2), st.lists(st.integers(1, 3), max_size=3), st.just([])),
    lambda inner: st.tuples(
        st.integers(0, 2), st.lists(st.integers(1, 3), max_size=3), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 4), st.sampled_from([(), ("Linear",), None]))
@example((0, [], [(1, [1], [])]), 2, ())  # what is ahead of the layers and tied is no embedding
def test_every_tensor_of_any_model_is_placed_once(shape, devices, no_split):
    """Models of any tree of modules, with ties across it: each parameter and buffer has one block and one device."""
    with torch.device("meta"):
        model = Tree(shape, None)
    costed = planner.cost(Request(TrainingCase.of(model, Workload(seq_len=64), no_split=no_split)))
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    named += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    assert sorted(name for block in costed.blocks for name in block.tensors) == sorted(named)
    device_map = balance(costed, machine(*[64 * MIB] * devices))
    assert {device_of(name, device_map) for name in named} <= set(range(devices))
    for group in costed.structure.ties:
        assert len({device_of(name, device_map) for name in group}) == 1
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert sum(cost.weights for cost in costed.costs) == weights


def test_rotary_embeddings_stay_with_the_embedding():
    """A module without parameters, registered last and run first, does not end up at the tail."""
    device_map = balance(
        planner.cost(Request(TrainingCase.of(models.llama(), Workload(seq_len=64)))), machine(*[64 * MIB] * 4)
    )
    assert device_map["model.rotary_emb"] == device_map["model.embed_tokens"]


def test_weights_are_placed_even_when_the_prediction_is_over_capacity():
    """A model that loads but is predicted not to train gets a map by which it loads."""
    costed = planner.cost(Request(TrainingCase.of(models.llama(), Workload(batch_size=64, seq_len=4096))))
    weights = sum(cost.weights for cost in costed.costs)
    devices = machine(weights // 2, weights // 2, weights // 3)
    plan = evaluate("balanced", costed, balance(costed, devices), devices)
    assert plan.shortfall > 0
    held = dict.fromkeys((device.index for device in devices), 0)  # without the inputs, which its term counts too
    for block, cost in zip(costed.blocks, costed.costs, strict=True):
        held[plan.device_map[block.name]] += cost.weights
    assert all(held[device.index] <= device.available for device in devices)


def test_weights_that_do_not_fit_are_refused_with_the_figures():
    """Never a silent spill to the host: by how much it does not fit is in the exception."""
    costed = planner.cost(Request(TrainingCase.of(models.llama(), Workload())))
    with pytest.raises(DoesNotFit) as caught:
        balance(costed, machine(1000, 1000))
    assert caught.value.available == 2000
    assert caught.value.needed == sum(cost.weights for cost in costed.costs)


def real_machine(*sizes):
    """Devices as the inventory returns them."""
    return levelled([describe(index, f"npu:{index}", size, Settings()) for index, size in enumerate(sizes)])


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_small_differences_between_devices_change_no_map(name):
    """Devices of one type that differ by up to 0.9 %, as real ones do from run to run, get the map of equal ones."""
    costed = planner.cost(Request(TrainingCase.of(models.ALL[name](), Workload(seq_len=64))))
    equal = balance(costed, real_machine(*[64 * MIB] * 4))

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.floats(0, 0.009), min_size=4, max_size=4))
    def check(differences):
        assert balance(costed, real_machine(*[int(64 * MIB * (1 - part)) for part in differences])) == equal

    check()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-25 * MIB, 25 * MIB), min_size=4, max_size=4))
def test_small_differences_on_a_mixed_machine(differences):
    """Two kinds of devices stay two kinds, with the same capacities, when each differs by some MiB."""
    nominal = [int(size * 1024 * MIB / 0.92) + 16 * MIB for size in (20, 20, 70, 70)]  # with the reserve of 8 %
    there = [size + difference for size, difference in zip(nominal, differences, strict=True)]
    first, second, third, fourth = (device.capacity for device in real_machine(*there))
    assert first == second and third == fourth
    assert abs(first - 20 * 1024 * MIB) <= 64 * MIB and abs(third - 70 * 1024 * MIB) <= 64 * MIB


def test_a_map_of_one_device_collapses():
    """accelerate takes a map of several entries for several devices, so one device is written as one entry."""
    assert collapse({"a": 1, "b": 1}) == {"": 1}
    assert collapse({"a": 1, "b": 0}) == {"a": 1, "b": 0}


@pytest.mark.parametrize("name", ["bert", "bert-classifier"])
def test_a_loss_that_does_not_follow_the_logits_keeps_its_head_on_the_first_device(name):
    """BERT gives labels and logits to the loss as they are, so all behind its last layer stays where labels arrive."""
    model = models.ALL[name]()
    assert computes_loss_on_first_device(model)
    devices = machine(*[64 * MIB] * 4)
    request = Request(TrainingCase.of(model, Workload(seq_len=64), loss_on_first=True), devices)
    device_map = balance(planner.cost(request), devices)
    layers = {name: place for name, place in device_map.items() if ".layer." in name}
    behind = list(device_map.items())[max(list(device_map).index(name) for name in layers) + 1 :]
    assert behind and {place for _, place in behind} == {0}
    assert len(set(layers.values())) >= 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_a_loss_that_follows_the_logits_leaves_the_head_free(name):
    """Causal and sequence-to-sequence models take the labels to the logits."""
    assert not computes_loss_on_first_device(models.ALL[name]())
