"""Maps for the time of a step, with micro-batches in flight, against brute force."""

import random
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest

from balance_shim.device import Device
from balance_shim.memory.cost import BlockCost
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner, timed_balance
from balance_shim.placement.balance import balance, for_memory
from balance_shim.placement.layouts import WORTH_A_CROSSING
from balance_shim.placement.plan import evaluate
from balance_shim.placement.request import Request
from balance_shim.timing.rates import DeviceRates, Operation
from balance_shim.timing.work import PREVIOUS, BlockWork, ModelWork, Pass, Transfer
from balance_shim.training.replan import worth_moving
from tests import models

MIB = 1 << 20
RATES = DeviceRates(1e14, 1e14, 1e14, 1e12, "nvlink", 1e11, 1e10)
TWICE = replace(RATES, float32=2e14)
MICRO_BATCHES = 8


@pytest.fixture(scope="module")
def llama():
    """The costs of a small model with six layers."""
    workload = Workload(seq_len=64, accumulation=MICRO_BATCHES)
    return planner.cost(Request(TrainingCase.of(models.llama(), workload, loss_on_first=False)))


def work_of(teraflops):
    """Return the work of a block whose forward pass computes this much, and its backward pass twice as much."""
    boundary = Transfer(PREVIOUS, forward=(1, 1000), returned=(1, 1000))
    passes = [Pass(((Operation(flops=int(times * teraflops * 1e12)), 1),)) for times in (1, 2)]
    return BlockWork(*passes, transfers=(boundary,))


def random_model(llama, seed, in_flight=MICRO_BATCHES):
    """Return costs in which bytes and operations of a block have nothing to do with each other."""
    dice = random.Random(seed)
    costs = [
        replace(BlockCost(weights=dice.randint(1, 20) * MIB, activations=dice.randint(0, 2) * MIB), rank=cost.rank)
        for cost in llama.costs
    ]
    work = ModelWork(tuple(work_of(dice.randint(1, 20) / 10) for _ in llama.costs), BlockWork())
    bare = replace(llama, costs=tuple(costs), records=(), first_record=None, first=BlockCost(), work=work)
    return bare.with_flights(in_flight, shares_inputs=True)


def machine(size, rates=(RATES,) * 3):
    return tuple(
        Device(index, f"cuda:{index}", size * MIB, size * MIB, rates=device_rates)
        for index, device_rates in enumerate(rates)
    )


def maps_in_a_row(costed, devices):
    """Yield every map whose devices take one run of the blocks each, in their order."""
    names = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(6)), "lm_head"]
    follows = {"model.rotary_emb": "model.embed_tokens", "model.norm": "lm_head"}
    for cuts in combinations_with_replacement(range(1, len(names) + 1), len(devices) - 1):
        device_map = {name: sum(position >= cut for cut in cuts) for position, name in enumerate(names)}
        yield {**device_map, **{name: device_map[other] for name, other in follows.items()}}


def longest_stage(costed, device_map, devices):
    """Return the seconds of the stage that computes longest, added up from the blocks' FLOPs."""
    seconds = [0.0] * len(devices)
    for block, work in zip(costed.blocks, costed.work.blocks, strict=True):
        place = device_map[block.name]
        seconds[place] += (work.forward.flops + work.backward.flops) / devices[place].rates.float32
    return max(seconds)


@pytest.mark.parametrize("rates", [(RATES,) * 3, (TWICE, RATES, RATES), (RATES, RATES, TWICE)])
@pytest.mark.parametrize("size", [60, 90, 200])
def test_no_map_that_fits_has_a_shorter_longest_stage(llama, size, rates):
    """Brute force over all maps of stages in a row finds none that is shorter and as empty; the step is shorter."""
    devices = machine(size, rates)
    changed = 0
    for seed in range(12):
        costed = random_model(llama, seed)
        constrained, memory_map = for_memory(costed, devices)
        device_map = timed_balance.shorter_step(constrained, memory_map, devices)
        if device_map is None:
            continue
        changed += 1
        plan = evaluate("balanced", costed, device_map, devices)
        before = evaluate("balanced", costed, memory_map, devices)
        room = max(timed_balance.ROOMS[0], before.worst.filled)
        assert plan.worst.filled <= room * (1 + 1e-9)
        assert plan.step_time.seconds <= before.step_time.seconds * (1 - timed_balance.WORTH_THE_MEMORY)
        best = min(
            longest_stage(costed, other, devices)
            for other in maps_in_a_row(costed, devices)
            if evaluate("balanced", costed, other, devices).worst.filled <= room
        )
        assert longest_stage(costed, device_map, devices) <= best * (1 + 2 * WORTH_A_CROSSING)
        assert balance(costed, devices) == balance(costed, devices) and dict(balance(costed, devices)) == device_map
    assert changed


def test_the_map_is_that_for_memory_where_time_does_not_count(llama):
    """One micro-batch at a time, devices of unknown rates, and a model that was not traced change no map."""
    devices = machine(200)
    costed = random_model(llama, 0)
    _, memory_map = for_memory(costed, devices)
    assert timed_balance.shorter_step(costed, memory_map, devices) is not None
    alone = costed.with_flights(1, shares_inputs=True)
    assert balance(alone, devices) == for_memory(alone, devices)[1]
    unknown = tuple(replace(device, rates=None) for device in devices)
    assert balance(costed, unknown) == memory_map
    assert balance(replace(costed, work=ModelWork()), devices) == memory_map


def test_plans_are_compared_by_the_step_that_they_are_made_for(llama):
    """With micro-batches in flight the shorter step is better and worth moving for, though it fills a device more."""
    devices = machine(200)
    costed = random_model(llama, 0)
    of_time, of_memory = (
        evaluate("balanced", costed, device_map, devices)
        for device_map in (balance(costed, devices), for_memory(costed, devices)[1])
    )
    assert of_time.worst.filled > of_memory.worst.filled
    assert timed_balance.is_better(of_time, of_memory) and not timed_balance.is_better(of_memory, of_time)
    assert worth_moving(of_memory, of_time) and not worth_moving(of_time, of_memory)
    noted = timed_balance.noted(of_time, costed, of_memory.device_map, devices)
    assert (
        "takes" in noted.notes[-1]
        and timed_balance.noted(of_memory, costed, of_memory.device_map, devices) is of_memory
    )
    one_at_a_time = [replace(plan, workload=replace(plan.workload, in_flight=1)) for plan in (of_time, of_memory)]
    assert timed_balance.is_better(one_at_a_time[1], one_at_a_time[0])
