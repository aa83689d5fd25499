"""The longest row that trains on given devices: transformers' `auto`, balance_shim, and that with its loss in chunks.

    python benchmarks/longest_sequence.py            measure what is not known yet, then print a table
    python benchmarks/longest_sequence.py --again    measure everything

train.py runs on simulated devices of real sizes with longer and longer rows until a device is out of memory, then by
bisection. That supposes that a row trains if a longer one does. The shim is told how long the rows are.

On the first two machines the head with its logits fills a device alone at the lengths found, and no map can split it;
`auto` happens to leave the head a device of its own there. On the others what limits is what a map can change.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from balance import SCRIPT, say, write_checkpoints
from balance_cases import CACHE, Results
from simulated_runs import Simulator

RESULTS = CACHE / "longest_sequence.jsonl"
SHORTEST, STEP = 1024, 64  # tokens
METHODS = {"auto": "transformers' `auto`", "shim": "balance_shim, full logits", "chunked": "balance_shim, chunks"}


@dataclass(frozen=True)
class Setup:
    name: str
    title: str
    model: str
    machine: str
    lora: bool
    checkpointing: bool = True

    def runs(self, simulator: Simulator, method: str, length: int) -> bool:
        """Return whether rows of `length` tokens train."""
        variables = {"BALANCE_MODE": "off"}
        if method != "auto":
            tuning = "lora" if self.lora else "full"
            variables = {"BALANCE_MODE": "balanced", "BALANCE_TUNING": tuning, "BALANCE_SEQ_LEN": str(length)}
            variables["BALANCE_LOSS"] = "full" if method == "shim" else "auto"
        arguments = ["--seq-len", str(length), *["--checkpointing"] * self.checkpointing, *["--lora"] * self.lora]
        run = simulator.run(self.machine, [SCRIPT, str(CACHE / self.model), *arguments], variables)
        if run.status == "failed":
            raise RuntimeError(f"{self.name}, {method}, {length} tokens:\n{run.log[-4000:]}")
        return run.status == "ok"


SETUPS = (
    Setup("lora", "Qwen2.5-7B, LoRA, checkpointing, 4 x 16 GiB", "Qwen2.5-7B", "4x16GiB", lora=True),
    Setup("full", "Qwen2.5-7B, all weights, checkpointing, 4 x 32 GiB", "Qwen2.5-7B", "4x32GiB", lora=False),
    Setup("full-20", "Qwen2.5-7B, all weights, checkpointing, 4 x 20 GiB", "Qwen2.5-7B", "4x20GiB", lora=False),
    Setup("lora-24", "Qwen2.5-7B, LoRA, 4 x 24 GiB", "Qwen2.5-7B", "4x24GiB", lora=True, checkpointing=False),
    Setup(
        "internvl-24",
        "InternVL2.5-26B-remote, LoRA, checkpointing, 4 x 24 GiB",
        "InternVL2.5-26B-remote",
        "4x24GiB",
        lora=True,
    ),
)


def longest(setup: Setup, method: str, simulator: Simulator) -> int:
    """Return the most tokens, in steps of `STEP`, that train; 0 if not even the shortest row does."""

    def trains(length: int) -> bool:
        fits = setup.runs(simulator, method, length)
        say(f"  {setup.name}, {method}: {length} tokens {'train' if fits else 'are out of memory'}")
        return fits

    fits, length = 0, SHORTEST
    while trains(length):
        fits, length = length, length * 2
    if not fits:
        return 0
    fails = length
    while fails - fits > STEP:
        middle = (fits + fails) // 2 // STEP * STEP
        if trains(middle):
            fits = middle
        else:
            fails = middle
    return fits


def table(results: Results) -> str:
    lines = [
        f"| Longest row that trains, tokens | {' | '.join(METHODS.values())} | chunks, times `auto` |",
        "| --- |" + " ---: |" * (len(METHODS) + 1),
    ]
    for setup in SETUPS:
        lengths = [results.by_key.get(f"{setup.name}/{method}", {}).get("tokens") for method in METHODS]
        cells = ["" if tokens is None else f"{tokens:,}" if tokens else "none" for tokens in lengths]
        ratio = f"{lengths[-1] / lengths[0]:.2f}" if lengths[0] and lengths[-1] else ""
        lines.append(f"| {setup.title} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what there are results for, too")
    parser.add_argument("--only", choices=list(METHODS), action="append", help="measure only this way; may be repeated")
    parser.add_argument("--setup", choices=[setup.name for setup in SETUPS], action="append")
    parser.add_argument("--table", action="store_true", help="print the table of what there is and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines (default: %(default)s)")
    options = parser.parse_args()

    results = Results(options.results)
    if not options.table:
        write_checkpoints({setup.model for setup in SETUPS})
        with Simulator() as simulator:
            for setup in SETUPS:
                for method in options.only or METHODS:
                    key = f"{setup.name}/{method}"
                    is_chosen = setup.name in (options.setup or [setup.name])
                    if is_chosen and (options.again or key not in results.by_key):
                        results.add(key, {"tokens": longest(setup, method, simulator)})
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
