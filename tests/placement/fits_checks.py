"""Random small models on random devices: what a plan says of fitting against what happens on simulated devices.

Run by test_fits.py: `python fits_checks.py RESULT.json SEED ...`; shapes only.
"""

import gc
import itertools
import json
import random
import sys

import torch

from balance_shim import simulation

simulation.install(simulation.parse_spec("3x64GiB:shapes"))

import accelerate  # noqa: E402 - as in a script, where the simulation is there before anything else
import transformers  # noqa: E402

from balance_shim.devices import Device  # noqa: E402
from balance_shim.memory.workload import Workload  # noqa: E402
from balance_shim.placement import planner  # noqa: E402
from balance_shim.placement.plan import evaluate  # noqa: E402

INPUTS = 256 << 10  # bytes; ids, labels and the like, which plans do not count
LEDGER = simulation._installation.machine.ledger


def main(result: str, seeds: list[str]) -> None:
    found = [check(int(seed)) for seed in seeds]
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


def check(seed: int) -> dict:
    """Return what the plan said, and the maps that contradict it."""
    choose = random.Random(seed)
    config, workload = random_case(choose)
    count = choose.choice([2, 3])
    sizes = [choose.choice([1.0, 1.0, 0.6, 1.7]) for _ in range(count)]
    model = build(config, "meta")
    costed = planner.cost(request(model, workload, [1 << 40] * count))
    need = evaluate("balanced", costed, {block.name: 0 for block in costed.blocks}, devices([1 << 40] * count))
    scale = need.worst.predicted_peak / sum(sizes) * choose.uniform(0.9, 1.5)
    capacities = [int(size * scale) for size in sizes]
    plan = planner.balanced(request(model, workload, capacities))
    wrong, says = [], "nothing"
    if plan is not None and not plan.shortfall:
        says = "fits"
        if not trains(config, workload, plan.device_map, [capacity + INPUTS for capacity in capacities]):
            wrong.append(plan.device_map)
    elif plan is not None:
        says = "does not fit"
        maps = contiguous_maps(costed.blocks, count)
        wrong = [each for each in maps if trains(config, workload, each, [size - INPUTS for size in capacities])]
    return {"seed": seed, "says": says, "wrong": wrong, "capacities": capacities}


def random_case(choose: random.Random):
    heads = choose.choice([2, 4])
    config = transformers.LlamaConfig(
        hidden_size=64 * heads, intermediate_size=choose.choice([256, 640]), num_hidden_layers=choose.randint(2, 4),
        num_attention_heads=heads, num_key_value_heads=choose.choice([1, 2]), vocab_size=choose.choice([1024, 16384]),
        tie_word_embeddings=choose.random() < 0.3, max_position_embeddings=4096,
    )  # fmt: skip
    workload = Workload(
        batch_size=choose.choice([1, 2]), seq_len=choose.choice([256, 1024]), accumulation=choose.choice([1, 1, 2]),
        optimizer=choose.choice(["adamw_torch", "adamw_torch_fused", "sgd"]),
        gradient_checkpointing=choose.random() < 0.4,
    )  # fmt: skip
    return config, workload


def build(config, device: str):
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def devices(capacities) -> tuple[Device, ...]:
    return tuple(Device(index, f"npu:{index}", size, size) for index, size in enumerate(capacities))


def request(model, workload, capacities):
    return planner.Request(model, workload, devices(capacities))


def contiguous_maps(blocks, count: int):
    """Yield every cut of the chain into one run a device; what is tied goes with the first of it."""
    names = [block.name for block in blocks]
    for cuts in itertools.combinations_with_replacement(range(len(names) + 1), count - 1):
        edges = (0, *cuts, len(names))
        places = [device for device in range(count) for _ in range(edges[device], edges[device + 1])]
        yield dict(zip(names, places, strict=True))


def trains(config, workload, device_map, capacities) -> bool:
    """Return whether two steps train under this map on devices of these bytes."""
    gc.collect()  # accelerate's hooks make cycles, which would keep devices filled
    LEDGER.capacities = (*capacities, *[0] * (3 - len(capacities)))
    try:
        model = build(config, "cpu")
        if config.tie_word_embeddings:
            model.tie_weights()
            device_map = {**device_map, "lm_head": device_map["model.embed_tokens"]}
        if len(set(device_map.values())) == 1:
            device_map = {"": next(iter(device_map.values()))}
        model = accelerate.dispatch_model(model, device_map, force_hooks=True)
        model.train()
        if workload.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.ones((workload.batch_size, workload.seq_len), dtype=torch.int64, device="npu:0")
        optimizer = {
            "adamw_torch": lambda: torch.optim.AdamW(model.parameters(), foreach=True),
            "adamw_torch_fused": lambda: torch.optim.AdamW(model.parameters(), fused=True),
            "sgd": lambda: torch.optim.SGD(model.parameters()),
        }[workload.optimizer]()
        for _ in range(2):
            for _ in range(workload.accumulation):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return True
    except torch.OutOfMemoryError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
