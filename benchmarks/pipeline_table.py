"""The speed-up of micro-batches in flight over models, kinds of devices and their number, against the ideal.

    python -m benchmarks.pipeline_table [--sample] [--records FILE] [--simulate]

Models are those of `benchmarks/models.py`, from their configurations alone. Each cell is planned: the clock predicts a
step of 2 N micro-batches on N devices under transformers' own map, under a balanced map, and with the micro-batches in
flight. Where they do not all fit, layers are recomputed in all three. `--simulate` runs the cells in `SIMULATED` as
trainings on simulated devices, too, shapes only: a minute or more for each of their steps. Cells that are in the
records are not done again.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, write_checkpoint
from simulated_runs import Simulator

ENOUGH = 0.75  # of the ideal
TOKENS = {"RTX4090": 2048, "A100-80GB": 4096, "H100": 8192}
SAMPLE = 3


@dataclass(frozen=True)
class Cell:
    """A training on `count` devices of one kind.

    Attributes:
        length: tokens of a sequence; 0: those in `TOKENS`.
    """

    model: str
    tuning: str
    kind: str
    count: int
    length: int = 0

    @property
    def name(self) -> str:
        length = f", {self.length} tokens" if self.length else ""
        return f"{self.model} {self.tuning}, {self.count} x {self.kind}{length}"

    @property
    def devices(self) -> str:
        return f"{self.count}x{self.kind}"

    @property
    def micro_batches(self) -> int:
        return 2 * self.count

    @property
    def tokens(self) -> int:
        return self.length or TOKENS[self.kind]

    @property
    def ideal(self) -> float:
        count, most = self.count, self.micro_batches
        return count * most / (most + count - 1)


TRAININGS = (("Qwen2.5-7B", "lora"), ("Qwen2.5-7B", "full"), ("Llama-3-8B", "lora"), ("InternVL2.5-26B", "lora"))
CELLS = (
    *(Cell(model, tuning, kind, count) for model, tuning in TRAININGS for kind in TOKENS for count in (4, 8)),
    # Short sequences on fast devices, for which the host is too slow.
    Cell("Qwen2.5-7B", "lora", "H100", 8, 2048),
)
SIMULATED = (
    Cell("Qwen2.5-7B", "lora", "RTX4090", 4),
    Cell("Qwen2.5-7B", "full", "A100-80GB", 4),
    Cell("Llama-3-8B", "lora", "H100", 4),
    Cell("InternVL2.5-26B", "lora", "A100-80GB", 4),
)


def planned(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return what the clock predicts for a cell; times in seconds."""
    from balance_shim import planning
    from balance_shim.memory.workload import sizes_of_chunks
    from balance_shim.placement import planner
    from balance_shim.placement.balance import DoesNotFit, balance
    from balance_shim.placement.baseline import judge
    from balance_shim.placement.plan import evaluate
    from balance_shim.plan_options import read_options

    arguments = (
        f"--gpus {cell.devices} --accumulation {cell.micro_batches} --tuning {cell.tuning} --seq-len {cell.tokens}"
    )
    options = read_options(["model", *arguments.split()], os.environ)[0]
    with planning.quiet_libraries():
        subject = planning.subject_of(write_checkpoint(MODELS[cell.model], folder / cell.model), options)
        request = planning.request_for(subject, options)
    best = None
    for recomputes in (False, True):
        costed = planner.cost(request.with_workload(gradient_checkpointing=recomputes))
        for in_flight in sizes_of_chunks(cell.micro_batches)[:-1]:
            flights = costed.with_flights(in_flight, shares_inputs=True)
            try:
                plan = evaluate("balanced", flights, balance(flights, request.devices), request.devices)
            except DoesNotFit:
                break
            if not plan.shortfall and (best is None or in_flight > best[1].workload.in_flight):
                best = costed, plan, recomputes
        if best is not None and best[1].workload.in_flight == cell.micro_batches:
            break
    if best is None:
        return {"fits": False}
    costed, plan, recomputes = best
    one = evaluate("balanced", costed, balance(costed, request.devices), request.devices)
    library = judge(costed, subject.ready.auto_map, request.devices) if subject.ready.auto_map else None
    of_library = library.plan.step_time if library is not None else None
    assert one.step_time is not None and plan.step_time is not None
    return {
        "fits": True,
        "recomputes": recomputes,
        "in_flight": plan.workload.in_flight,
        "auto": of_library and of_library.seconds,
        "auto_fits": library is not None and library.fits,
        "balanced": one.step_time.seconds,
        "pipelined": plan.step_time.seconds,
        "bound": plan.step_time.bound,
        "busy": plan.step_time.busy,
        "filled": plan.worst.filled,
    }


def simulated(cell: Cell, plan: dict[str, Any], simulator: Simulator, folder: Path) -> dict[str, Any]:
    """Return what trainings on simulated devices take under the three maps; None where one ran out of memory."""
    script = [str(Path(__file__).with_name("train.py")), str(folder / cell.model), "--seq-len", str(cell.tokens)]
    script += ["--accumulation", str(cell.micro_batches)]
    script += ["--lora"] * (cell.tuning == "lora") + ["--checkpointing"] * plan["recomputes"]
    ways = {
        "auto": {"BALANCE_MODE": "off"},
        "balanced": {},
        "pipelined": {"BALANCE_PIPELINE": str(plan["in_flight"])},
    }
    results: dict[str, Any] = {}
    for way, variables in ways.items():
        run = simulator.run(cell.devices, script, {"BALANCE_SEQ_LEN": str(cell.tokens), **variables})
        if run.status == "failed":
            print(run.log[-3000:], file=sys.stderr)
        results[way] = run.step_time and run.step_time["seconds"]
        results[f"{way} bound"] = run.step_time and run.step_time["bound"]
    return results


def main() -> None:
    """Make the records that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help=f"only {SAMPLE} cells")
    parser.add_argument("--simulate", action="store_true", help="simulate the trainings of some cells, too")
    parser.add_argument("--records", type=Path, default=Path(tempfile.gettempdir(), "pipeline_table.json"))
    options = parser.parse_args()
    # What is written for one cell serves the next.
    folder = options.records.with_suffix("")
    os.environ.setdefault("BALANCE_CACHE", str(folder / "cache"))
    cells = CELLS[:: len(CELLS) // SAMPLE][:SAMPLE] if options.sample else CELLS
    records: dict[str, Any] = json.loads(options.records.read_text()) if options.records.exists() else {}
    work = [(cell, False) for cell in cells]
    work += [(cell, True) for cell in SIMULATED[: 1 if options.sample else None]] if options.simulate else []
    with Simulator() as simulator:
        for number, (cell, simulates) in enumerate(work, start=1):
            key = f"{cell.name}{', simulated' * simulates}"
            bar = "#" * (20 * number // len(work))
            print(f"\r[{bar:20}] {number}/{len(work)} {key:60}", end="", file=sys.stderr, flush=True)
            if key in records:
                continue
            plan = records.get(cell.name) or planned(cell, folder)
            result = simulated(cell, plan, simulator, folder) if simulates else plan
            records[key] = {**asdict(cell), **result}
            options.records.write_text(json.dumps(records, indent=1))
    print(file=sys.stderr)
    print(table(records))


def table(records: dict[str, Any]) -> str:
    """Return the tables of `records` in Markdown."""
    lines = [
        "| training | devices | micro-batches | `auto` | balanced | in flight | computing | speed-up | ideal "
        "| of ideal | bound |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in CELLS:
        record = records.get(cell.name)
        if record is None:
            continue
        recomputed = ", checkpointing" if record.get("recomputes") else ""
        start = f"| {cell.model}, {cell.tuning}{recomputed} | {cell.count} x {cell.kind} | "
        start += f"{cell.micro_batches} x {cell.tokens} tokens |"
        if not record["fits"]:
            lines.append(f"{start} does not fit | | | | | | | |")
            continue
        speedup = (record["auto"] or record["balanced"]) / record["pipelined"]
        mark = "" if speedup >= ENOUGH * cell.ideal else "**"
        auto = f"{record['auto']:.2f} s" if record["auto"] else "no map"
        fewer = f" ({record['in_flight']} in flight)" if record["in_flight"] < cell.micro_batches else ""
        lines.append(
            f"{start} {auto}{'' if record['auto_fits'] else ', does not fit'} | {record['balanced']:.2f} s | "
            f"{record['pipelined']:.2f} s{fewer} | {sum(record['busy']):.2f} | {speedup:.2f}x | {cell.ideal:.2f}x | "
            f"{mark}{speedup / cell.ideal:.2f}{mark} | {record['bound']} |"
        )
    trainings = []
    for cell in SIMULATED:
        record, plan = records.get(f"{cell.name}, simulated"), records.get(cell.name)
        if record is None or plan is None:
            continue
        ways = ("auto", "balanced", "pipelined")
        times = [f"{record[way]:.2f} s" if record[way] else "out of memory" for way in ways]
        predicted = " / ".join(f"{plan[way]:.2f}" if plan[way] else "none" for way in ways)
        trainings.append(f"| {cell.name} | {' | '.join(times)} | {predicted} |")
    if trainings:
        lines += ["", "| simulated | `auto` | balanced | in flight | the same, planned |", "|---|---:|---:|---:|---:|"]
    lines += trainings
    return "\n".join(lines)


if __name__ == "__main__":
    main()
