"""What the shim does for an unmodified script, in under five minutes and without a GPU: `make demo`.

examples/finetune.py fine-tunes SmolLM2-135M with device_map="auto", first without the shim and then with it. It runs on
the accelerators of this machine if there are several, otherwise on four simulated ones. A device size between the two
worst peaks then shows the difference that matters: one run stops for lack of memory, the other trains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tests.end_to_end.assets import smollm2_folder, text_file
from tests.end_to_end.run import HIDDEN_ACCELERATORS, child_environment

MIB = 1024**2
MODES = {"without": "off", "with": "balanced"}
SIMULATED_DEVICES = 4
LARGE = 24 * 1024 * MIB  # no limit in this job


@dataclass(frozen=True)
class Run:
    """One training: the loss of each step, the peak in bytes of each device by name, and why it stopped, if it did."""

    losses: list[float]
    peaks: dict[str, int]
    failure: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=128)
    options = parser.parse_args()
    training = [
        f"--steps={options.steps}",
        f"--batch-size={options.batch_size}",
        f"--sequence-length={options.sequence_length}",
    ]
    present = real_devices()
    shape = f"batch {options.batch_size} x {options.sequence_length} tokens"
    print(f"SmolLM2-135M, all weights trained in fp32 with AdamW, {shape}.")

    with contextlib.closing(Bar(options.steps * (6 if present > 1 else 4))) as bar:
        bar.now("preparing the model and the text")
        disable_progress_bar()  # of transformers, which would be drawn over ours
        files = [f"--model={smollm2_folder()}", f"--data={text_file()}"]

        def train(how: str, capacity: int | None) -> Run:
            return run(MODES[how], [*files, *training], capacity, bar)

        if present > 1:
            real = {how: train(how, None) for how in MODES}
            show_peaks(f"{present} devices of this machine", real)
            show_losses(real)
        simulated = {how: train(how, LARGE) for how in MODES}
        show_peaks(f"{SIMULATED_DEVICES} simulated devices", simulated)
        show_losses(simulated)

        worst = {how: max(outcome.peaks.values()) for how, outcome in simulated.items()}
        if worst["with"] >= worst["without"]:
            say("\nThe shim did not lower the worst peak, so there is no device size to show.")
            return 1
        capacity = (worst["with"] + worst["without"]) // 2 // MIB * MIB
        say(f"\nThe same on {SIMULATED_DEVICES} simulated devices of {capacity // MIB} MiB")
        tight = {how: train(how, capacity) for how in MODES}
        for how, outcome in tight.items():
            say(f"  {how:<8} {outcome.failure or 'trains, losses ' + listed(outcome.losses)}")
    return 0 if "OutOfMemoryError" in tight["without"].failure and not tight["with"].failure else 1


def run(mode: str, arguments: list[str], capacity: int | None, bar: Bar) -> Run:
    """Run the example in `mode` on simulated devices of `capacity` bytes, or on the real ones if that is None.

    Raises:
        RuntimeError: it failed for another reason than lack of memory.
    """
    machine = "real" if capacity is None else f"{SIMULATED_DEVICES} x {capacity // MIB} MiB"
    bar.now(f"training, BALANCE_MODE={mode}, {machine}")
    with tempfile.TemporaryDirectory() as folder:
        variables = {"BALANCE_MODE": mode, "BALANCE_REPORT": folder}
        if capacity is not None:
            variables["BALANCE_SIMULATE"] = f"{SIMULATED_DEVICES}x{capacity // MIB}MiB"
        sampler = PeakSampler() if capacity is None else None
        command = [
            sys.executable,
            "-m",
            "balance_shim",
            "run",
            str(REPOSITORY / "examples" / "finetune.py"),
            *arguments,
        ]
        command.append(f"--output={folder}/output")
        with open(f"{folder}/stderr", "w+") as errors:
            child = subprocess.Popen(
                command,
                env=environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            losses = [bar.step(float(match[1])) for line in child.stdout if (match := re.search(r"loss (\S+)", line))]
            code = child.wait()
            peaks = sampler.stop() if sampler else simulated_peaks(Path(folder))
            errors.seek(0)
            text = errors.read()
    failure = next((line for line in reversed(text.splitlines()) if "OutOfMemoryError" in line), "") if code else ""
    if code and not failure:
        raise RuntimeError(f"{' '.join(command)} ended with {code}\n{text[-4000:]}")
    return Run(losses, peaks, failure)


def environment(variables: dict[str, str]) -> dict[str, str]:
    """What a run sees: `variables`, all cores, and no real accelerator if it simulates."""
    hidden = HIDDEN_ACCELERATORS if "BALANCE_SIMULATE" in variables else {}
    return child_environment({"OMP_NUM_THREADS": str(os.cpu_count()), **hidden, **variables})


def simulated_peaks(folder: Path) -> dict[str, int]:
    record = json.loads((folder / "simulation.json").read_text(encoding="utf-8"))
    return {device["name"]: device["peak"] for device in record}


def real_devices() -> int:
    """How many accelerators this machine has."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


class PeakSampler:
    """The most memory that other processes hold on each real device, read from the driver from outside.

    From outside, because the run without the shim is to have nothing of ours in its process. What the driver reports
    includes what torch keeps cached, in both runs alike.
    """

    def __init__(self) -> None:
        self._before = self._used()
        self._most = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stop.set()
        self._thread.join()
        return {name: most - self._before[name] for name, most in self._most.items()}

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for name, used in self._used().items():
                self._most[name] = max(self._most[name], used)

    @staticmethod
    def _used() -> dict[str, int]:
        import torch

        kind = torch.accelerator.current_accelerator().type
        module = torch.get_device_module(kind)
        used = {}
        for index in range(torch.accelerator.device_count()):
            free, total = module.mem_get_info(index)
            used[f"{kind}:{index}"] = total - free
        return used


class Bar:
    """How far the demo has come, on standard error, in training steps."""

    def __init__(self, steps: int):
        self._bar = tqdm(total=steps, unit="step", bar_format="{desc} {n_fmt}/{total_fmt} steps {elapsed}")

    def close(self) -> None:
        self._bar.close()

    def now(self, text: str) -> None:
        self._bar.set_description_str(text)

    def step(self, loss: float) -> float:
        self._bar.update()
        return loss


def show_peaks(machine: str, runs: dict[str, Run]) -> None:
    say(f"\nPeak memory on {machine}, MiB")
    say(f"  {'':<8}{'without':>12}{'with balance_shim':>20}")
    for name in runs["with"].peaks:
        say(f"  {name:<8}{runs['without'].peaks[name] / MIB:>12.0f}{runs['with'].peaks[name] / MIB:>20.0f}")
    worst = [max(runs[how].peaks.values()) for how in MODES]
    say(f"  {'worst':<8}{worst[0] / MIB:>12.0f}{worst[1] / MIB:>20.0f}")


def show_losses(runs: dict[str, Run]) -> None:
    say("Losses of the same seed")
    for how, outcome in runs.items():
        say(f"  {how:<8} {outcome.failure or listed(outcome.losses)}")


def listed(losses: list[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


def say(line: str) -> None:
    tqdm.write(line)  # to standard output, above the bar


if __name__ == "__main__":
    sys.exit(main())
