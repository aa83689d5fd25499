"""Mode `auto`: which remedy it chooses, in described cases, from configs alone. No GPU and no weights are needed."""

import os
from dataclasses import replace
from functools import cache, partial

import pytest

from balance_shim import planning
from balance_shim.placement import alternatives, zero_prediction
from balance_shim.placement.alternatives import Limits
from balance_shim.placement.balance import DoesNotFit, balance
from balance_shim.placement.candidates import SIMPLEST_FIRST, Candidate, choose
from balance_shim.placement.plan import evaluate
from balance_shim.placement.planner import cost
from balance_shim.plan_options import read_options
from balance_shim.replicas.shares import divide
from balance_shim.timing.step_time import StepTime
from tests.sampling import sampled

CONFIGS = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
ORDER = ("one_device", "balanced", "checkpointing", "pipeline", "replicas", "zero3", "zero3_offload")
ALL = Limits(pipeline="")
NO_RANKS = Limits(replicas="a notebook", zero3="a notebook", pipeline="")
NO_PIPELINE = Limits(replicas="a notebook", zero3="a notebook")

# name -> (model, options, what this process can do, the remedy that has to be chosen)
CASES = {
    "one card with room": ("0.5B", "--gpus 1xRTX4090", ALL, "one_device"),
    "one big card": ("7B", "--gpus 1xH200", ALL, "one_device"),
    "one card, too small without offload": ("7B", "--gpus 1xT4 --tuning lora --seq-len 512", ALL, "zero3_offload"),
    "a small model on four equal cards": ("0.5B", "--gpus 4xRTX3090", ALL, "replicas"),
    "LoRA on two cards that hold the model": ("7B", "--gpus 2xRTX4090 --tuning lora --accumulation 8", ALL, "replicas"),
    "two cards that hold the model together": ("7B", "--gpus 2x12GiB@RTX3060 --tuning lora", ALL, "zero3"),
    "NVLink and full fine-tuning": ("7B", "--gpus 8xH100 --accumulation 4", ALL, "zero3"),
    "long sequences": ("7B", "--gpus 8xA100-80GB --seq-len 32768", ALL, "zero3"),
    "a large model": ("70B", "--gpus 8xA100-40GB --tuning lora", ALL, "zero3"),
    "nearly full cards on PCIe": ("70B", "--gpus 8xRTX3090 --tuning lora --seq-len 512", ALL, "zero3_offload"),
    "one fast card among slow ones": ("7B", "--gpus 1xA100-80GB+3xT4 --tuning lora", ALL, "one_device"),
    "a notebook, accumulation": ("7B", "--gpus 4xRTX4090 --tuning lora --accumulation 8", NO_RANKS, "pipeline"),
    "a notebook, one sequence": ("7B", "--gpus 4xRTX4090 --tuning lora", NO_RANKS, "balanced"),
    "a notebook, nothing in flight": ("7B", "--gpus 4xA100-40GB --accumulation 4", NO_PIPELINE, "balanced"),
    "a notebook, tight": ("7B", "--gpus 2x12GiB@RTX3060 --tuning lora", NO_RANKS, "checkpointing"),
    "unknown cards": ("7B", "--gpus 4x24GiB --tuning lora", ALL, "balanced"),
    "nothing fits": ("70B", "--gpus 4xRTX4090", ALL, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    """A function from a model and options to the request; costs are kept in a folder, as between trainings."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("cache")

    @cache
    def subject(model):
        config = Qwen2Config(**CONFIGS[model], max_position_embeddings=131072, architectures=["Qwen2ForCausalLM"])
        config.dtype = "bfloat16"
        return planning.subject_of(config, read_options(["model", "--gpus", "1x80GiB", "--precision=bf16"], {})[0])

    def request(model, options):
        environ = {"BALANCE_CACHE": str(folder)}
        return planning.request_for(subject(model), read_options(["model", *options.split()], environ)[0])

    return request


# Enumerating every way takes about a minute each.
SLOW_CASES = ("one fast card among slow ones", "a large model", "nearly full cards on PCIe")


@pytest.mark.parametrize("name", sampled(CASES, *(name for name in CASES if name not in SLOW_CASES), mark="sweep"))
def test_the_best_remedy_is_chosen(request_of, name):
    """The remedy that a reader of the case expects, which no other way of any remedy beats, and the reasons."""
    model, options, limits, expected = CASES[name]
    request = request_of(model, options)
    choice = alternatives.choice_for(request, limits)
    assert (choice.chosen and choice.chosen.remedy) == expected, choice.candidates
    assert [candidate.remedy for candidate in choice.candidates] == sorted(
        (candidate.remedy for candidate in choice.candidates), key=SIMPLEST_FIRST.index
    )
    assert all(candidate.reason for candidate in choice.candidates)
    rates = _rates_of_every_way(request, limits)
    assert (_first_of_the_fastest(rates) if "unknown" not in name else "balanced") == expected, rates
    if choice.chosen is None:
        assert choice.change, "the smallest change that would fit"
    elif choice.chosen.step_time is not None:
        assert choice.chosen.step_time.tokens_per_second >= max(rates.values()) * 0.98


def _first_of_the_fastest(rates):
    return next((remedy for remedy in ORDER if rates.get(remedy, 0) >= max(rates.values(), default=0) * 0.98 > 0), None)


def _rates_of_every_way(request, limits):
    """Return remedy -> tokens per second of the best of all its ways that fit.

    Nothing of what chooses is used: every device, count, number of micro-batches in flight and offload is tried, with
    and without recomputation, on the model's costs, the memory of a map and the clock.
    """
    rates = {}

    def record(remedy, plans, rate):
        if all(plan is not None and not plan.shortfall for plan in plans) and rate():
            rates[remedy] = max(rates.get(remedy, 0), rate())

    plain = request.in_training().with_workload(in_flight=1, shares_inputs=False)
    for variant in (plain, plain.with_workload(gradient_checkpointing=True)):
        devices, batches = variant.devices, variant.workload.accumulation
        for device in devices:
            alone = cost(replace(variant, devices=(device,)))
            plan = evaluate("balanced", alone, {block.name: device.index for block in alone.blocks}, (device,))
            record("one_device", [plan], lambda plan=plan: _rate(plan))
        costed = cost(variant)
        if len(devices) > 1:
            plan = _map(costed, devices)
            record("checkpointing" if variant is not plain else "balanced", [plan], lambda plan=plan: _rate(plan))
            for flights in range(2, batches + 1) if not limits.pipeline else ():
                plan = _map(costed.with_flights(flights, shares_inputs=True), devices)
                record("pipeline", [plan], lambda plan=plan: _rate(plan))
            for count in range(2, len(devices) + 1) if not limits.replicas else ():
                shares = divide({device.index: device.available for device in devices}, count)
                of_each = [tuple(device for device in devices if device.index in share) for share in shares]
                own = {
                    share: cost(replace(variant.with_workload(replicated=True), devices=share))
                    for share in set(of_each)
                }
                plans = {share: _map(costs, share) for share, costs in own.items()}
                record("replicas", plans.values(), partial(_rate_of_replicas, plans, own, of_each, batches))
        for offload in ("none", "optimizer", "all") if not limits.zero3 else ():
            is_possible = len(devices) > 1 or offload != "none"
            if is_possible and zero_prediction.fullest(costed, devices, offload) <= 1:
                time = zero_prediction.time_of(costed, devices, offload)
                name = "zero3" if offload == "none" else "zero3_offload"
                record(name, [], lambda time=time: time.tokens_per_second if time else 0)
    return rates


def _map(costed, devices):
    try:
        return evaluate("balanced", costed, balance(costed, devices), devices)
    except DoesNotFit:
        return None


def _rate(plan):
    return plan.step_time.tokens_per_second if plan.step_time else 0


def _rate_of_replicas(plans, costs, shares, batches):
    """All wait for the slowest; a ring of n sends 2 (n - 1) / n of the gradients, behind half of a micro-batch."""
    times = [plans[share].step_time for share in shares]
    if None in times:
        return 0
    slowest, ranks = max(time.seconds for time in times), len(shares)
    weakest = min(shares, key=lambda share: sum(device.capacity for device in share))
    gradients = sum(block.gradients for block in costs[weakest].costs) / len(weakest)
    link = min(device.rates.link_bytes for share in shares for device in share)
    sums = 2 * (ranks - 1) / ranks * gradients / link
    return sum(time.tokens for time in times) / (slowest + max(0, sums - slowest / batches / 2))


def test_the_same_inputs_give_the_same_answer(request_of):
    """Nothing is measured or drawn."""
    request = request_of("0.5B", "--gpus 4xRTX3090")
    assert alternatives.choice_for(request, ALL) == alternatives.choice_for(request, ALL)


def _candidate(remedy, rate, fits=True, impossible=""):
    time = None if rate is None else StepTime(1.0, rate, (1.0,), "devices")
    return Candidate(remedy, fits=fits, worst_fill=0.5, step_time=time, impossible=impossible)


def test_ties_go_to_the_simpler_and_reasons_tell_why_others_lost():
    """Two percent are no difference; neither what does not fit nor what is impossible can win."""
    choice = choose(
        [
            _candidate("zero3", 1010),
            _candidate("balanced", 1000),
            _candidate("one_device", 300),
            _candidate("replicas", 5000, impossible="a notebook"),
            _candidate("zero3_offload", 9000, fits=False),
        ]
    )
    assert choice.chosen.remedy == "balanced"
    reasons = {candidate.remedy: candidate.reason for candidate in choice.candidates}
    assert reasons["replicas"] == "a notebook" and reasons["zero3_offload"].startswith("does not fit")
    assert "0.30 times" in reasons["one_device"] and "simpler" in reasons["zero3"]


def test_without_known_speeds_a_map_comes_first():
    """Nobody knows what is fastest then: the balanced map where it fits, else what makes the model fit."""
    assert choose([_candidate("one_device", None), _candidate("balanced", None)]).chosen.remedy == "balanced"
    candidates = [_candidate("balanced", None, fits=False), _candidate("zero3", None), _candidate("replicas", None)]
    assert choose(candidates).chosen.remedy == "zero3"
    assert choose([_candidate("balanced", None, fits=False)]).chosen is None


def test_quantized_weights_are_not_partitioned():
    """ZeRO-3 is in the table with the reason, and cannot win, where the config says that weights are quantized."""
    from transformers import Qwen2Config

    config = Qwen2Config(**CONFIGS["0.5B"], architectures=["Qwen2ForCausalLM"])
    options = read_options(
        ["model", "--gpus", "2xRTX4090", "--precision=bf16"], {**os.environ, "BALANCE_CACHE": "off"}
    )[0]
    subject = planning.subject_of(config, options)
    assert not planning.limits_of(subject, options).zero3
    subject.resolved.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "quantized" in planning.limits_of(subject, options).zero3


def test_one_device_is_costed_with_its_own_kernels(request_of):
    """What the other cards of the machine lack does not slow down the one that trains alone: as on a machine of one."""
    mixed = request_of("0.5B", "--gpus 1xA100-40GB+1xT4 --seq-len 512")
    alone = request_of("0.5B", "--gpus 1xA100-40GB --seq-len 512")
    first = [alternatives.choice_for(request, ALL).candidates[0] for request in (mixed, alone)]
    assert first[0].step_time.seconds == first[1].step_time.seconds and first[0].worst_fill == first[1].worst_fill


def test_ranks_that_would_have_fewer_devices_are_no_candidate(request_of):
    """A display card, or one that the script leaves out: the other candidates stay, and the table tells why."""
    request = request_of("0.5B", "--gpus 2xRTX4090 --seq-len 512")
    for shares in (lambda count: (), lambda count: tuple((index, index + 2) for index in range(count))):
        choice = alternatives.choice_for(request, ALL, shares)
        replicas = next(candidate for candidate in choice.candidates if candidate.remedy == "replicas")
        assert choice.chosen.remedy == "zero3" and "left out" in replicas.reason
