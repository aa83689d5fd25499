"""How long a plan takes beyond imports, without the cache and from it: `python benchmarks/planning.py`.

From a config to the proved plan, the model built on the meta device included; the median of three rounds, each with a
cache of its own. Wall-clock seconds in one process with two threads.
"""

import gc
import logging
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from models import MODELS

from balance_shim.device import Device
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.request import Request

GIB = 2**30
CASES = (("Qwen2.5-7B", 4, 80), ("Qwen2.5-72B", 16, 80), ("Mixtral-8x7B", 8, 80))
WORKLOADS = {
    "full": Workload(seq_len=2048),
    "LoRA, checkpointing": Workload(seq_len=4096, tuning="lora", gradient_checkpointing=True),
}
ROUNDS = 3


def main() -> int:
    torch.set_num_threads(2)
    logging.disable(logging.CRITICAL)
    plan("Qwen2.5-7B", 2, 80, WORKLOADS["LoRA, checkpointing"], None)  # what the first plan imports
    print("| model | devices | training | seconds | from the cache |")
    print("| --- | ---: | --- | ---: | ---: |")
    for name, count, size in CASES:
        for title, workload in WORKLOADS.items():
            cold, warm = [], []
            for _ in range(ROUNDS):
                folder = Path(tempfile.mkdtemp())
                cold.append(plan(name, count, size, workload, folder))
                warm.append(plan(name, count, size, workload, folder))
                shutil.rmtree(folder)
            times = f"{statistics.median(cold):.2f} | {statistics.median(warm):.2f}"
            print(f"| {name} | {count} | {title} | {times} |", flush=True)
    return 0


def plan(name: str, count: int, size: int, workload: Workload, folder: Path | None) -> float:
    """Return the seconds from a config to a plan on `count` devices of `size` GiB."""
    config = next(model for model in MODELS.values() if model.name == name).make_config()
    devices = tuple(Device(index, f"cuda:{index}", size * GIB, int(0.92 * size * GIB)) for index in range(count))
    gc.collect()  # what the plan before has left is not this one's
    start = time.perf_counter()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    best = planner.balanced(Request(TrainingCase.of(model, workload), devices, cache=folder))
    assert best is not None
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
