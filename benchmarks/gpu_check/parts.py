"""The parts of the check: generators of records, each run in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balance_shim.units import GIB, MIB

from .card import LIMITLESS, Card

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Attributes: name, what it shows, the seconds that it may take, and the function that does it."""

    name: str
    shows: str
    seconds: int
    run: Callable[[Card], Iterator[Record]]


def facts(card: Card) -> Iterator[Record]:
    import accelerate
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    yield {"what": "versions", **versions, "python": sys.version.split()[0], "cudnn": _cudnn()}
    yield {"what": "card", **card.facts()}
    context = card.outside()
    yield {"what": "context", "bytes": context}
    left = torch.ones(1024, 1024, device=card.device, dtype=torch.bfloat16, requires_grad=True)
    before = card.module.memory_allocated(0)
    product = left @ left
    forward = card.module.memory_allocated(0) - before - product.numel() * product.element_size()
    yield {"what": "workspace after a product", "bytes": forward}
    product.sum().backward()
    del product
    left.grad = None
    card.synchronize()
    yield {"what": "workspaces after a backward pass", "bytes": card.module.memory_allocated(0) - before}
    yield {"what": "outside of the allocator after that", "bytes": card.outside() - context}


def _cudnn() -> Any:
    import torch

    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None


def truth(card: Card) -> Iterator[Record]:
    from . import training

    for trial in training.cases():
        yield {"model": trial.model, "workload": trial.title, **_compared(card, trial)}


def _compared(card: Card, trial: Any) -> Record:
    from . import training

    plan = training.predicted(card, trial)
    record: Record = {
        "predicted": plan.predicted_peak,
        "predicted_reserved": getattr(plan, "predicted_reserved", None),
        "terms": plan.terms,
    }
    try:
        record |= training.measured(card, trial).to_json()
    except Exception as error:  # one case that fails is a record, and the others go on
        record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    card.empty()
    return record


def stages(card: Card) -> Iterator[Record]:
    import torch

    from balance_shim.memory.training_case import TrainingCase
    from balance_shim.memory.workload import Workload
    from balance_shim.placement import planner
    from balance_shim.placement.request import Request

    from . import configs
    from . import stages as stage_at_a_time

    for model, count, checkpointing in (("Qwen2.5-7B", 4, False), ("Llama-3-8B", 8, True)):
        workload = Workload(seq_len=2048, loss="chunked", gradient_checkpointing=checkpointing)
        devices = tuple(card.as_planned(index, 80 * GIB) for index in range(count))
        request = Request(TrainingCase.of(configs.build(model, torch.bfloat16, "meta"), workload), devices)
        plan = planner.balanced(request)
        if plan is None:
            yield {"model": model, "error": "no plan"}
            continue
        for device in plan.devices:
            place = device.device.index
            peaks = stage_at_a_time.measure_stage(card, request.model, plan.device_map, place, 0, workload)
            yield {
                "model": model, "devices": count, "workload": workload.describe(), "stage": place,
                "predicted": device.predicted_peak, "predicted_reserved": getattr(device, "predicted_reserved", None),
                **peaks.to_json(),
            }  # fmt: skip
            card.empty()


def chunks(card: Card) -> Iterator[Record]:
    """Compare the loss in chunks with the loss from full logits."""
    from . import chunked_loss

    yield from chunked_loss.compared(card)


def out_of_memory(card: Card) -> Iterator[Record]:
    from . import recovery

    yield from recovery.recovered(card)


def full_card(card: Card) -> Iterator[Record]:
    """What the inventory and the doctor do on a card that others have filled."""
    import subprocess

    shim = Path(__file__).resolve().parents[2] / "shim"
    environ = {**os.environ, "PYTHONPATH": f"{shim}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    inventory = "from balance_shim import devices, settings; print(devices.inventory(settings.Settings()))"
    leaving = 100 * MIB
    with card.filled(leaving):
        for command, arguments in (("inventory", ["-c", inventory]), ("doctor", ["-m", "balance_shim", "doctor"])):
            done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=60)
            yield {
                "what": command, "left_free": leaving, "code": done.returncode, "output": done.stdout[-1500:],
                "traceback": "Traceback" in done.stderr, "errors": done.stderr[-1500:],
            }  # fmt: skip


def liger(card: Card) -> Iterator[Record]:
    """Whether a model that Liger has patched is still traced, and what Liger's own step takes."""
    from . import training

    if importlib.util.find_spec("liger_kernel") is None:
        yield {"skipped": "liger_kernel is not installed"}
        return
    import torch
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    from balance_shim.memory.training_case import TrainingCase
    from balance_shim.memory.workload import Workload
    from balance_shim.placement import planner
    from balance_shim.placement.request import Request

    from . import configs

    model = configs.build("Qwen2.5-7B, 2 layers", torch.bfloat16, card.device)
    apply_liger_kernel_to_qwen2(model=model)
    device = card.as_planned(0, LIMITLESS)
    costed = planner.cost(Request(TrainingCase.of(model, Workload(seq_len=2048)), (device,)))
    yield {"what": "trace of a patched model", "method": str(costed.method)}
    ids = torch.randint(10, 30000, (1, 2048), device=card.device)
    model.train()
    with card.measured() as peaks:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    yield {"what": "one step of the patched model", **peaks[0].to_json()}
    plain = training.predicted(card, training.case("Qwen2.5-7B, 2 layers"))
    yield {"what": "plan of the plain model", "predicted": plain.predicted_peak, "terms": plain.terms}


def monitor(card: Card) -> Iterator[Record]:
    from balance_shim.monitoring.readings import Meter

    meter = Meter(card.kind, [0])
    for with_others in (True, False):
        seconds = card.seconds(lambda with_others=with_others: meter.read(with_others=with_others), repeats=200)
        yield {"what": "one reading", "asks_the_driver": with_others, "seconds": seconds}
    yield {"what": "others on an idle card", "bytes": [reading.others for reading in meter.read()]}


def attention(card: Card) -> Iterator[Record]:
    from . import attention_choice

    yield from attention_choice.compared(card)


PARTS = (
    Part("facts", "versions, the context, workspaces", 20, facts),
    Part("attention", "the kernel that torch chooses and the rule, and the memory kept", 30, attention),
    Part("full-card", "the inventory and the doctor on a full card", 30, full_card),
    Part("monitor", "what a reading costs", 15, monitor),
    Part("chunks", "the loss in chunks and from full logits", 45, chunks),
    Part("out-of-memory", "recovery in forward, backward and recomputation", 50, out_of_memory),
    Part("liger", "a model that Liger has patched", 25, liger),
    Part("stages", "each stage of maps of 4 and 8 devices alone", 100, stages),
    Part("truth", "predicted, allocated and reserved memory", 225, truth),
)
