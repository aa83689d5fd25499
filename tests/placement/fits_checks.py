"""Random small models on random devices: what a plan says of fitting against what happens on simulated devices.

Run by test_fits.py: `python fits_checks.py RESULT.json KIND SEED ...`; shapes only.
"""

import gc
import itertools
import json
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch

from balance_shim import simulation

simulation.install(simulation.parse_spec("3x64GiB:shapes"))

import accelerate  # noqa: E402 - as in a script, where the simulation is there before anything else
import peft  # noqa: E402
import transformers  # noqa: E402

from balance_shim.device import Device  # noqa: E402
from balance_shim.memory.training_case import TrainingCase  # noqa: E402
from balance_shim.memory.workload import Workload  # noqa: E402
from balance_shim.placement import planner  # noqa: E402
from balance_shim.placement.plan import evaluate  # noqa: E402
from balance_shim.placement.request import Request  # noqa: E402

INPUTS = 256 << 10  # bytes; ids, labels and the like, which plans do not count
# Of a device that plans leave free, and that what does not fit may be off by: as true as predictions of this kind are.
MARGIN = {"pictures": 0.09}
ROOMIEST = {"pictures": 2.5}  # devices at most so many times as large as it takes, where else none would fit
LEDGER = simulation._installation.machine.ledger


@dataclass(frozen=True)
class Case:
    """One model and how it is trained."""

    config: Any
    workload: Workload
    model_class: Any = transformers.LlamaForCausalLM
    lora: bool = False

    def build(self, device: str) -> Any:
        with torch.device(device):
            model = self.model_class(self.config).to(torch.float32 if self.workload.autocast else torch.bfloat16)
            if self.lora:
                model.add_adapter(peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]))
        return model

    @property
    def batch(self) -> dict[str, Any]:
        ids = torch.ones((self.workload.batch_size, self.workload.seq_len), dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if getattr(self.config, "vision_config", None) is None:
            return batch
        side = 16  # patches; four of them make a token
        ids[:, 10 : 10 + side * side // 4] = self.config.image_token_id
        grid = torch.tensor([[1, side, side]] * self.workload.batch_size)
        batch |= {"pixel_values": torch.zeros(grid.prod(1).sum(), 3 * 2 * 14 * 14), "image_grid_thw": grid}
        if transformers.__version__ >= "5":
            batch["mm_token_type_ids"] = (ids == self.config.image_token_id).long()
        return batch


def main(result: str, kind: str, seeds: list[str]) -> None:
    results = [check(kind, int(seed)) for seed in seeds]
    with open(result, "w", encoding="utf-8") as file:
        json.dump(results, file)


def check(kind: str, seed: int) -> dict:
    """Return what the plan said, and the maps that contradict it."""
    choose = random.Random(seed)
    case = KINDS[kind](choose)
    count = choose.choice([2, 3]) if kind == "text" else 2
    sizes = [choose.choice([1.0, 1.0, 0.6, 1.7]) for _ in range(count)]
    model = case.build("meta")
    costed = planner.cost(request(case, model, [1 << 40] * count))
    need = evaluate("balanced", costed, {block.name: 0 for block in costed.blocks}, devices([1 << 40] * count))
    scale = need.worst.predicted_peak / sum(sizes) * choose.uniform(0.9, ROOMIEST.get(kind, 1.9))
    capacities = [int(size * scale) for size in sizes]
    margin = MARGIN.get(kind, 0)
    plan = planner.balanced(request(case, model, [int(size * (1 - margin)) for size in capacities]))
    wrong, prediction = [], "nothing"
    if plan is not None and not plan.shortfall:
        prediction = "fits"
        if not trains(case, plan.device_map, [capacity + INPUTS for capacity in capacities]):
            wrong.append(plan.device_map)
    elif plan is not None:
        prediction = "does not fit"
        maps = contiguous_maps(costed.blocks, count)
        tight = [int(size * (1 - margin) ** 2) - INPUTS for size in capacities]
        wrong = [device_map for device_map in maps if trains(case, device_map, tight)]
    return {"seed": seed, "prediction": prediction, "method": costed.method, "wrong": wrong, "capacities": capacities}


def random_sizes(choose: random.Random) -> dict[str, Any]:
    heads = choose.choice([2, 4])
    return {
        "hidden_size": 64 * heads, "intermediate_size": choose.choice([256, 640]), "num_attention_heads": heads,
        "num_hidden_layers": choose.randint(2, 4), "num_key_value_heads": choose.choice([1, 2]),
        "vocab_size": choose.choice([1024, 16384]), "tie_word_embeddings": choose.random() < 0.3,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def random_workload(choose: random.Random, **changes: Any) -> Workload:
    return Workload(
        batch_size=choose.choice([1, 2]), seq_len=choose.choice([256, 1024]), accumulation=choose.choice([1, 1, 2]),
        optimizer=choose.choice(["adamw_torch", "adamw_torch_fused", "sgd"]),
        gradient_checkpointing=choose.random() < 0.4, **changes,
    )  # fmt: skip


def text(choose: random.Random) -> Case:
    return Case(transformers.LlamaConfig(**random_sizes(choose)), random_workload(choose))


def lora(choose: random.Random) -> Case:
    return Case(transformers.LlamaConfig(**random_sizes(choose)), random_workload(choose, tuning="lora"), lora=True)


def autocast(choose: random.Random) -> Case:
    return Case(transformers.LlamaConfig(**random_sizes(choose)), random_workload(choose, autocast=True))


def experts(choose: random.Random) -> Case:
    config = transformers.MixtralConfig(**random_sizes(choose), num_local_experts=4)
    return Case(config, random_workload(choose), transformers.MixtralForCausalLM)


def pictures(choose: random.Random) -> Case:
    sizes = {**random_sizes(choose), "tie_word_embeddings": False}
    vision = {
        "hidden_size": 128, "out_hidden_size": sizes["hidden_size"], "depth": 2, "num_heads": 4,
        "intermediate_size": 320, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        **sizes, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}, vision_config=vision
    )
    config.image_token_id, config.vision_start_token_id, config.video_token_id = 100, 101, 102
    return Case(config, random_workload(choose), transformers.Qwen2_5_VLForConditionalGeneration)


KINDS = {build.__name__: build for build in (text, lora, autocast, experts, pictures)}


def devices(capacities) -> tuple[Device, ...]:
    return tuple(Device(index, f"npu:{index}", size, size) for index, size in enumerate(capacities))


def request(case: Case, model, capacities):
    return Request(
        TrainingCase.of(model, case.workload, trains=lambda _, parameter: parameter.requires_grad, batch=case.batch),
        devices(capacities),
    )


def contiguous_maps(blocks, count: int):
    """Yield every cut of the chain into one run a device; what is tied goes with the first of it."""
    names = [block.name for block in blocks]
    for cuts in itertools.combinations_with_replacement(range(len(names) + 1), count - 1):
        edges = (0, *cuts, len(names))
        places = [device for device in range(count) for _ in range(edges[device], edges[device + 1])]
        yield dict(zip(names, places, strict=True))


def trains(case: Case, device_map, capacities) -> bool:
    """Return whether two steps train under this map on devices of these bytes."""
    gc.collect()  # accelerate's hooks make cycles, which would keep devices filled
    LEDGER.resize((*capacities, *[0] * (3 - len(capacities))))
    try:
        model = case.build("cpu")
        if case.config.tie_word_embeddings:
            model.tie_weights()
            device_map = {**device_map, "lm_head": device_map["model.embed_tokens"]}
        if len(set(device_map.values())) == 1:
            device_map = {"": next(iter(device_map.values()))}
        model = accelerate.dispatch_model(model, device_map, force_hooks=True)
        model.train()
        if case.workload.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = {name: tensor.to("npu:0") for name, tensor in case.batch.items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = {
            "adamw_torch": lambda: torch.optim.AdamW(trained, foreach=True),
            "adamw_torch_fused": lambda: torch.optim.AdamW(trained, fused=True),
            "sgd": lambda: torch.optim.SGD(trained),
        }[case.workload.optimizer]()
        for _ in range(2):
            for _ in range(case.workload.accumulation):
                loss_of(case, model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return True
    except torch.OutOfMemoryError:
        return False


def loss_of(case: Case, model, batch):
    if not case.workload.autocast:
        return model(**batch, use_cache=False).loss
    with torch.autocast("npu", dtype=torch.bfloat16):  # as the Trainer has it
        return accelerate.utils.convert_outputs_to_fp32(model.__call__)(**batch, use_cache=False).loss


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
