"""Each device of a map alone, beside the same devices together: `... RESULT`. A process of its own."""

import json
import sys
from pathlib import Path

from balance_shim import simulation
from tests.processes import REPOSITORY

simulation.install(simulation.parse_spec("4x8GiB:shapes"))
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import torch  # noqa: E402 - after the simulation, as in the check itself
from gpu_check import configs, stages  # noqa: E402
from gpu_check.card import Card  # noqa: E402
from gpu_check.table import page  # noqa: E402

from balance_shim.memory.training_case import TrainingCase  # noqa: E402
from balance_shim.memory.workload import Workload  # noqa: E402
from balance_shim.placement import planner  # noqa: E402
from balance_shim.placement.request import Request  # noqa: E402


def together(card, model, device_map, workload):
    """Return the peak of each device while all of the map trains, dispatched by accelerate."""
    from accelerate import dispatch_model

    card.empty()  # of what was measured before
    module = torch.get_device_module(card.kind)
    model = model.to_empty(device="cpu")
    model.config.use_cache = False
    model = dispatch_model(model, device_map={name: int(place) for name, place in device_map.items()})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    for place in range(4):
        module.reset_peak_memory_stats(place)
    ids = torch.ones(1, workload.seq_len, dtype=torch.int64, device=card.device)
    for _ in range(stages.STEPS):
        outputs = model(input_ids=ids, labels=ids)
        loss = outputs.loss
        del outputs
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [module.max_memory_allocated(place) for place in range(4)]


def main():
    card = Card()
    workload = Workload(seq_len=512)
    devices = tuple(card.as_planned(index, 8 << 30) for index in range(4))
    request = Request(TrainingCase.of(configs.build("tiny", torch.float32, "meta"), workload), devices)
    plan = planner.balanced(request)
    alone = [
        stages.measure_stage(card, request.model, plan.device_map, place, 0, workload).allocated for place in range(4)
    ]
    records = [
        {"stage": place, "predicted": device.predicted_peak, "allocated": alone[place]}
        for place, device in enumerate(plan.devices)
    ]
    part = {"status": "done", "seconds": 1, "records": records, "errors": ""}
    text = page({"commit": "here", "parts": {"stages": part}})
    results = {"alone": alone, "together": together(card, request.model, plan.device_map, workload), "page": text}
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
