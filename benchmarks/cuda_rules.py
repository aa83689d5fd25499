"""How true predictions are under CUDA's rules: attention without a fused kernel, autocast, padded batches.

    python benchmarks/cuda_rules.py                     all cases, in about two minutes
    python benchmarks/cuda_rules.py 'grouped-*'         some of them

Each case of `tests/memory/simulated_cases.py` is trained on simulated devices, with shapes only, and the peak of each
device is compared with the predicted one. The last line has the median and the largest error of all devices.
"""

from __future__ import annotations

import fnmatch
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.end_to_end.run import HIDDEN_ACCELERATORS, child_environment  # noqa: E402 - needs the path
from tests.memory.simulated_cases import CASES  # noqa: E402

SCRIPT = REPOSITORY / "tests" / "memory" / "simulated_peaks.py"
RULES = ("grouped-*", "*float32*", "*autocast*", "*ragged*", "qwen-vl*")
FOUND = re.compile(r"^  (npu:[0-9]+): predicted ([0-9.]+), found ([0-9.]+)", re.MULTILINE)


def main(patterns: list[str]) -> int:
    names = [name for name in CASES if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or RULES)]
    if not names:
        print(f"no case fits; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(SCRIPT), str(result), folder, "shapes", *names]
        environment = child_environment({**HIDDEN_ACCELERATORS, "PYTHONPATH": str(REPOSITORY)})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.exists():
            print(done.stderr[-4000:], file=sys.stderr)
            return 1
        faults = {name: text for name, text in json.loads(result.read_text(encoding="utf-8")).items() if text}
    errors = []
    print("| case | devices | largest error |\n|---|---:|---:|")
    for part in re.split(r"^(?=[a-z0-9-]+: )", done.stdout, flags=re.MULTILINE):
        pairs = [(float(predicted), float(peak)) for _, predicted, peak in FOUND.findall(part)]
        if pairs:
            off = [predicted / peak - 1 for predicted, peak in pairs]
            errors += map(abs, off)
            print(f"| {part.partition(':')[0]} | {len(off)} | {max(off, key=abs):+.2%} |")
    print(f"\nmedian {statistics.median(errors):.2%}, worst {max(errors):.2%} of {len(errors)} devices")
    for name, text in faults.items():
        print(f"{name}: {text.strip().splitlines()[-1]}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
