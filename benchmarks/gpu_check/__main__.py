"""What only a GPU can show, in one command and at most nine minutes: `make check-gpu`.

    python benchmarks/gpu_check                          on the accelerator of this machine
    python benchmarks/gpu_check --parts facts attention  only these
    python benchmarks/gpu_check --simulate 80GiB         simulated: shows that the check works, no more

Needs torch, transformers, accelerate, peft and wrapt, and no network. Each part runs in a process of its own within its
own time. The results are `gpu-check.json` and `gpu-check.md` in the output folder; they list what was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "shim")]

SHAPES_ONLY = ("liger", "stages", "truth")
MOST_SECONDS = 530  # all parts together, so that writing the results ends within nine minutes


def main() -> int:
    from gpu_check.parts import PARTS
    from gpu_check.table import page

    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--simulate", metavar="SIZE", help="on one simulated device of this size")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for the results")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # this process runs one part
    options = parser.parse_args()
    if options.only:
        return _run(options.only, options.simulate)
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: dict[str, Any] = {}
    for number, part in enumerate(PARTS, start=1):
        if part.name not in options.parts:
            continue
        left = MOST_SECONDS - (time.monotonic() - began)
        print(f"[{number}/{len(PARTS)}] {part.name}: {part.shows}", file=sys.stderr, flush=True)
        results[part.name] = _child(part.name, min(part.seconds, left), options.simulate)
        _write(options.output, results, page)
    print((options.output / "gpu-check.md").read_text(encoding="utf-8"))
    return int(any(result["status"] == "failed" for result in results.values()))


def _child(name: str, seconds: float, simulate: str | None) -> dict[str, Any]:
    """Return {status: "done", "out of time" or "failed", seconds, records, errors} of one part."""
    if seconds < 5:
        return {"status": "out of time", "seconds": 0, "records": [], "errors": "not begun: no time was left"}
    command = [sys.executable, str(HERE), "--only", name, *(["--simulate", simulate] if simulate else [])]
    # One device: on several, a plain Trainer would train by DataParallel.
    environ = {**os.environ, "BALANCE_MODE": "off", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    environ["CUDA_VISIBLE_DEVICES"] = environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    began = time.monotonic()
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
        status = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        status = "out of time"
    records = [json.loads(line) for line in output.splitlines() if line.startswith('{"record"')]
    return {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "records": [entry["record"] for entry in records],
        "errors": errors[-3000:] if status == "failed" else "",
    }


def _run(name: str, simulate: str | None) -> int:
    """Run one part here, and print its records as they come."""
    if simulate:
        from balance_shim import simulation
        from balance_shim.device_spec import parse_spec

        shapes = ":shapes" if name in SHAPES_ONLY else ""  # real sizes are too much for the host's processor
        simulation.install(parse_spec(f"1x{simulate}{shapes}"))
    from gpu_check.card import Card
    from gpu_check.parts import PARTS

    part = next(part for part in PARTS if part.name == name)
    for record in part.run(Card()):
        print(json.dumps({"record": record}, default=str), flush=True)
    return 0


def _write(folder: Path, results: dict[str, Any], page: Any) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    content = {"commit": commit, "parts": results}
    (folder / "gpu-check.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "gpu-check.md").write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
