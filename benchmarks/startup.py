"""What arming adds to the start of an interpreter, in milliseconds.

    python benchmarks/startup.py            prints a table
    python benchmarks/startup.py --check    fails, too, if a budget is exceeded

Each way is started many times, in turn with a bare interpreter so that both see the same load of the machine. The
figure is the median of the differences within such a pair; the spread is that of its middle half.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
SHIM, INJECTED = REPOSITORY / "shim", REPOSITORY / "sitecustomize_example"


class Way(NamedTuple):
    """A way of starting Python: its code, its PYTHONPATH, BALANCE_MODE, and the most it may add, in milliseconds."""

    name: str
    code: str
    paths: tuple[Path, ...]
    mode: str | None
    budget: float


WAYS = (
    Way("import balance_shim", "import balance_shim", (SHIM,), None, 15),
    Way("injected, BALANCE_MODE unset", "pass", (SHIM, INJECTED), None, 3),
    Way("injected, BALANCE_MODE=off", "pass", (SHIM, INJECTED), "off", 3),
    Way("injected, BALANCE_MODE=balanced", "pass", (SHIM, INJECTED), "balanced", 15),
)
BARE = Way("bare interpreter", "pass", (SHIM,), None, 0)


def started(way: Way) -> float:
    """Return the milliseconds that one start and end of Python takes."""
    # Without PYTHONDONTWRITEBYTECODE, which some containers set: it would measure the compiler.
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("BALANCE_", "PYTHON"))}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, way.paths))
    if way.mode is not None:
        environ["BALANCE_MODE"] = way.mode
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", way.code], env=environ, check=True)
    return (time.perf_counter() - begin) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40, help="starts of each way (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a budget is exceeded")
    options = parser.parse_args()

    for way in (BARE, *WAYS):  # compiled files and the page cache
        started(way)
    bare: list[float] = []
    added: dict[Way, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            bare.append(started(BARE))
            added[way].append(started(way) - bare[-1])

    print(f"Python {sys.version.split()[0]}, {options.runs} starts of each; milliseconds")
    print(f"{'':<34}{'median':>8}{'middle half':>18}{'budget':>9}")
    exceeded = False
    for name, times, budget in [(BARE.name, bare, 0.0), *((f"+ {w.name}", added[w], w.budget) for w in WAYS)]:
        low, median, high = statistics.quantiles(times, n=4)
        print(f"{name:<34}{median:>8.1f}{low:>9.1f} to {high:<5.1f}{budget or '':>9}")
        exceeded |= bool(budget) and median > budget
    return 1 if options.check and exceeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
