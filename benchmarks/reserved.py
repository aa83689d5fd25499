"""The memory that plans predict torch's allocator to reserve, and what it reserves on simulated devices.

    python benchmarks/reserved.py                          the cases of balance.py on four equal devices
    python benchmarks/reserved.py --cases 'Qwen2.5-7B/lora/*/shim'

Both follow the same model of the allocator (`virtual/allocator.py`): what is compared is the sequence of allocations,
which a plan puts together from a trace of single blocks. The table goes to standard output as Markdown.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from balance_cases import MACHINES, WORKLOADS, cases
from models import REPOSITORY, write_checkpoint
from simulated_runs import Simulator

MIB = 2**20
TRAIN = REPOSITORY / "benchmarks" / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["*/*/4/shim"], metavar="PATTERN")
    options = parser.parse_args()
    lines = ["| case | device | allocated MiB | reserved MiB | predicted | error |", "|---|---|---:|---:|---:|---:|"]
    errors = []
    with Simulator() as simulator, tempfile.TemporaryDirectory() as folder:
        for case in cases(options.cases):
            print(case.key, file=sys.stderr)
            workload = WORKLOADS[case.workload]
            checkpoint = write_checkpoint(case.model, Path(folder, case.model.name))
            command = [str(TRAIN), str(checkpoint), *workload.arguments]
            run = simulator.run(MACHINES[case.machine].spec, command, workload.variables)
            if run.status != "ok" or run.plan is None:
                lines.append(f"| {case.key} | {run.status} | | | | |")
                print(run.log[-1000:], file=sys.stderr)
                continue
            rows = zip(run.plan["devices"], run.peaks, run.reserved_peaks, strict=True)
            for device, allocated, reserved in rows:
                predicted = device["predicted_reserved"]
                if predicted is None:
                    lines.append(
                        f"| {case.key} | {device['name']} | {allocated / MIB:.0f} | {reserved / MIB:.0f} | - | |"
                    )
                    continue
                errors.append(predicted / reserved - 1)
                figures = f"{allocated / MIB:.0f} | {reserved / MIB:.0f} | {predicted / MIB:.0f} | {errors[-1]:+.1%}"
                lines.append(f"| {case.key} | {device['name']} | {figures} |")
    sizes = sorted(map(abs, errors))
    if sizes:
        lines += ["", f"Error: median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}."]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
