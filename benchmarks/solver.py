"""What planning costs: the solver alone, and everything from a model on the meta device to its map.

    OMP_NUM_THREADS=1 python benchmarks/solver.py            prints tables
    OMP_NUM_THREADS=1 python benchmarks/solver.py --check    fails, too, if the solver is over its budget

Figures are milliseconds of the fastest of several runs for the solver, and of one run for planning.
"""

import argparse
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

from balance_shim.device import describe
from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import RunPeaks
from balance_shim.placement.solver import Table, least_fill, partition
from balance_shim.report.table import table
from balance_shim.settings import Settings

BUDGET = 5.0  # milliseconds for a partition of 200 blocks on 16 devices
GIB = 1 << 30


def timed(work: Callable[[], Any], runs: int = 1) -> float:
    """Return the milliseconds that `work` takes, in the fastest of `runs`."""
    best = float("inf")
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best * 1000


def random_costs(blocks: int) -> list[BlockCost]:
    """Return blocks like those of a language model, no two alike, in bytes."""
    source = random.Random(blocks)

    def size(most: int) -> int:
        return source.randint(most // 2, most)

    costs = []
    for _ in range(blocks):
        weights, activations = size(400 << 20), size(200 << 20)
        gradients, more = weights, size(50 << 20)
        costs.append(
            BlockCost(
                weights,
                gradients,
                2 * weights,
                activations,
                activations + more,
                activations + more + gradients,
                weights,
            )
        )
    return costs


def sums(costs: list[BlockCost]) -> Table:
    """Return the loads of every run as a table of plain sums."""
    rows = []
    for start in range(len(costs) + 1):
        row = [0]
        for cost in costs[start:]:
            row.append(row[-1] + cost.weights + cost.gradients + cost.optimizer + cost.activations)
        rows.append(row)
    return Table(rows)


def solver() -> float:
    """Print what the solver takes by itself; return the figure that has a budget."""
    budgeted, rows = 0.0, []
    for blocks, devices in ((40, 4), (200, 8), (200, 16), (1000, 16), (2000, 16)):
        costs = random_costs(blocks)
        capacities = [float(GIB * (24, 24, 48, 80)[device % 4]) for device in range(devices)]
        loads = [sums(costs)] * devices
        full = timed(lambda loads=loads, c=capacities, n=blocks: partition(loads, c, n), 20)
        least = timed(lambda loads=loads, c=capacities, n=blocks: least_fill(loads, c, n), 20)

        def worked_out(costs: list[BlockCost] = costs, c: list[float] = capacities) -> None:
            partition([RunPeaks(costs)] * len(c), c, len(costs))

        lazily = timed(worked_out, 5)
        rows.append([str(blocks), str(devices), *(f"{milliseconds:.2f}" for milliseconds in (full, least, lazily))])
        if (blocks, devices) == (200, 16):
            budgeted = full
    print("The solver alone, milliseconds")
    print(table(["blocks", "devices", "partition", "least_fill alone", "partition, peaks worked out"], rows))
    return budgeted


def planning(counts: list[int], kinds: list[int]) -> None:
    """Print what planning takes for models of ever more layers, and of ever more kinds of layers."""
    import torch
    import transformers

    from balance_shim.memory.training_case import TrainingCase
    from balance_shim.memory.workload import Workload
    from balance_shim.placement import planner
    from balance_shim.placement.balance import balance
    from balance_shim.placement.request import Request

    transformers.logging.set_verbosity_error()
    devices = tuple(describe(index, f"cuda:{index}", 80 * GIB, Settings()) for index in range(8))
    workload = Workload(batch_size=1, seq_len=2048)

    def model(layers: int, different: int = 1) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        with torch.device("meta"):
            llama = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
            for number, layer in enumerate(llama.model.layers):
                width = 2816 + 64 * (number % different)
                for name in ("gate_proj", "up_proj"):
                    setattr(layer.mlp, name, torch.nn.Linear(1024, width, bias=False, dtype=torch.bfloat16))
                layer.mlp.down_proj = torch.nn.Linear(width, 1024, bias=False, dtype=torch.bfloat16)
        return llama

    def row(llama: Any, first: str) -> list[str]:
        request = Request(TrainingCase.of(llama, workload), devices)
        costed = []
        to_cost = timed(lambda: costed.append(planner.cost(request)))
        to_place = timed(lambda: balance(costed[0], devices))
        layers = len(llama.model.layers)
        return [first, f"{to_cost:.0f}", f"{to_cost / layers:.2f}", f"{to_place:.0f}", f"{to_place / layers:.2f}"]

    columns = ["cost", "a layer", "balance", "a layer"]
    row(model(4), "")  # imports, and what torch does once
    print("\nA Llama of like layers on 8 devices, milliseconds")
    print(table(["layers", *columns], [row(model(count), str(count)) for count in counts]))
    print(f"\nA Llama of {counts[1]} layers of so many kinds, milliseconds")
    print(table(["kinds", *columns], [row(model(counts[1], kind_count), str(kind_count)) for kind_count in kinds]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the solver is over its budget")
    parser.add_argument("--solver-only", action="store_true", help="without models, which take torch")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    milliseconds = solver()
    print(f"200 blocks on 16 devices: {milliseconds:.2f} ms; the budget is {BUDGET} ms")
    if not options.solver_only:
        planning([16, 32, 64, 128, 256, 512], [1, 2, 4, 8, 16])
    return 1 if options.check and milliseconds > BUDGET else 0


if __name__ == "__main__":
    raise SystemExit(main())
