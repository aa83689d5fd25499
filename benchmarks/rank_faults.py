"""Trainings under ZeRO-3 in which one rank does something else: what is printed, how long it takes, what is left.

python benchmarks/rank_faults.py [--runs 40] [--seed 0] [--markdown docs/rank-faults.md]

Faults, moments and ranks are drawn from the seed. Each run is a real training of a tiny model by real processes on the
CPU, and is right if one line names the rank and the cause, if the exit code is that of the cause, if it has ended
within the time-out and 30 seconds of the fault, and if no process is left.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "tests/zero/scripts/rank_fault.py"
TIMEOUT = 30  # seconds that ranks wait for each other
LIMIT = TIMEOUT + 30
MARK = "RANK_FAULTS_RUN"  # a variable by which the processes of a run are recognised

STEPS = ("first step", "later step")
ANYWHERE = ("load", *STEPS, "evaluation", "save")
MOMENTS = {
    "skips": (*STEPS, "evaluation"),
    "lacks pictures": (*STEPS, "evaluation"),
    "lacks gradients": STEPS,
    "raises": ANYWHERE,
    "exits": ANYWHERE,
    "finishes": ("load", *STEPS, "evaluation"),
    "killed": ANYWHERE,
    "sleeps": ANYWHERE,
    "interrupted": ("start", *ANYWHERE),
}


@dataclass(frozen=True)
class Case:
    """One run: `rank` of `size` ranks has `fault` at `moment`; `delay`: seconds from then to an interrupt."""

    fault: str
    moment: str
    rank: int
    size: int
    sent: signal.Signals
    delay: float

    def __str__(self) -> str:
        if self.fault == "interrupted":
            return f"{self.sent.name} {self.delay:.1f} s after: {self.moment}"
        return f"rank {self.rank} of {self.size} {self.fault}: {self.moment}"

    @property
    def line(self) -> str:
        """A regular expression for the line that explains the end."""
        return {
            "skips": rf"rank {self.rank} skips model\.layers\.1, ",
            "lacks pictures": rf"(rank {self.rank} skips|rank \d runs) tower.*only the batch of rank \d has pixels",
            "lacks gradients": rf"not on rank {self.rank}, gradients reach tower|gradients reach tower\S* on rank",
            "raises": rf"rank {self.rank} failed with ValueError: a planned fault \(rank_fault\.py:\d+, in at\)",
            "exits": rf"rank {self.rank} ended with exit code 4",
            "finishes": rf"rank {self.rank} came to the end of the program",
            "killed": rf"rank {self.rank} was ended by SIGKILL",
            "sleeps": rf"rank {self.rank} kept others waiting .*rank_fault\.py:\d+, in at",
            "interrupted": rf"ended by {self.sent.name}",
        }[self.fault]

    @property
    def exit_codes(self) -> tuple[int, ...]:
        """The exit codes that are right; none stands for any but 0."""
        if self.fault == "interrupted":
            return (128 + self.sent, -self.sent)
        return {"exits": (4,), "killed": (137,), "raises": (1,)}.get(self.fault, ())


@dataclass(frozen=True)
class Outcome:
    """What was seen of a run; `problems` is empty where all is right."""

    line: str
    exit_code: int
    seconds: float
    problems: tuple[str, ...]


def draw(runs: int, seed: int) -> list[Case]:
    """Return `runs` cases: each fault in turn, everything else at random."""
    source = random.Random(seed)
    faults = list(MOMENTS)
    cases = []
    for number in range(runs):
        fault = faults[number % len(faults)]
        size = 3 if number % 8 == 7 else 2
        sent = source.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        cases.append(
            Case(fault, source.choice(MOMENTS[fault]), source.randrange(size), size, sent, source.uniform(0, 3))
        )
    return cases


def environment(case: Case, mark: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCE_")}
    armed = os.pathsep.join(str(REPOSITORY / folder) for folder in ("shim", "sitecustomize_example"))
    return {
        **inherited, "PYTHONPATH": armed, "BALANCE_MODE": "zero3", "BALANCE_NPROC": str(case.size), MARK: mark,
        "BALANCE_NCCL_TIMEOUT": str(TIMEOUT), "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def make_model(folder: Path) -> Path:
    """Write the tiny model that all runs load."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCE_")}
    subprocess.run([sys.executable, str(SCRIPT), "--make", "--model", str(folder)], check=True, env=inherited,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return folder


def run(case: Case, model: Path, folder: Path) -> Outcome:
    """Run one training and judge how it ends."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--model", str(model), "--output", str(folder), "--fault", case.fault,
         "--moment", case.moment, "--rank", str(case.rank)],
        env=environment(case, mark), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    messages: list[str] = []
    reader = threading.Thread(target=lambda: messages.extend(process.stderr or ()), daemon=True)
    reader.start()
    begun = 0.0  # when the moment came
    for line in process.stdout or ():
        if not begun and line.startswith(f"moment {case.moment}"):
            begun = time.monotonic()
            if case.fault == "interrupted":
                threading.Timer(case.delay, process.send_signal, [case.sent]).start()
                begun += case.delay
    try:
        process.wait(LIMIT)
        problems = []
    except subprocess.TimeoutExpired:
        problems = ["still running"]
        process.kill()
        process.wait()
    seconds = time.monotonic() - begun if begun else 0.0
    left = processes_of(mark)
    for process_left in left:
        process_left.kill()
    reader.join(10)
    return judged(case, "".join(messages), process.returncode, seconds, problems, bool(begun), len(left))


def processes_of(mark: str, patience: float = 5.0) -> list[psutil.Process]:
    """Return what is left of the run `mark`, other than what ends by itself within `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
            except psutil.Error:
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def judged(case: Case, stderr: str, code: int, seconds: float, problems: list[str], begun: bool, left: int) -> Outcome:
    lines = [line for line in stderr.splitlines() if line.startswith("balance_shim: ")]
    fitting = [line for line in lines if re.search(case.line, line)]
    if not begun:
        problems.append("the moment did not come")
    silent = case.moment == "start" and case.sent == signal.SIGTERM and code == -signal.SIGTERM  # as any program
    if len(fitting) != 1 and not (case.fault == "interrupted" and silent):
        problems.append(f"{len(fitting)} lines name the cause")
    if not code or (case.exit_codes and code not in case.exit_codes):
        problems.append(f"exit code {code}")
    if seconds > LIMIT:
        problems.append(f"took {seconds:.0f} s")
    if left:
        problems.append(f"{left} processes left")
    allowed = 1 if case.fault == "raises" else 0
    if stderr.count("Traceback (most recent call last)") > allowed:
        problems.append("tracebacks of others")
    shown = fitting[0] if fitting else lines[-1] if lines else ""
    if problems:
        sys.stderr.write(f"--- {case}: {', '.join(problems)}\n{stderr[-6000:]}\n")
    return Outcome(shown.removeprefix("balance_shim: "), code, seconds, tuple(problems))


def table(results: dict[int, tuple[Case, Outcome]], command: str) -> str:
    """Return the results as a page in Markdown."""
    right = sum(not outcome.problems for _, outcome in results.values())
    rows = [
        f"| {number} | {case} | {shortened(outcome.line)} | {outcome.exit_code} | {outcome.seconds:.0f} | "
        f"{'; '.join(outcome.problems) or 'right'} |"
        for number, (case, outcome) in results.items()
    ]
    return "\n".join(
        [
            "# One rank does something else", "",
            f"Made by `{command}`: {right} of {len(results)} runs are right. Ranks wait {TIMEOUT} seconds for each "
            "other. Seconds count from the fault, or from the signal, to the end of the last process.", "",
            "| run | what happens | line | exit code | seconds | judged |",
            "|---:|---|---|---:|---:|---|", *rows, "",
        ]
    )  # fmt: skip


def shortened(line: str) -> str:
    return line.split("; ZeRO-3 needs every rank")[0].replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=lambda text: [int(number) for number in text.split(",")], help="numbers of runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args()
    command = f"benchmarks/rank_faults.py --runs {options.runs} --seed {options.seed}"
    results: dict[int, tuple[Case, Outcome]] = {}

    def perform(number: int, case: Case) -> None:
        outcome = run(case, model, folder / str(number))
        results[number] = case, outcome
        print(f"{number:3} {case}: {', '.join(outcome.problems) or 'right'} ({outcome.seconds:.0f} s)", flush=True)
        print(f"    {shortened(outcome.line)}", flush=True)
        if options.markdown:
            options.markdown.write_text(table(dict(sorted(results.items())), command))

    cases = [
        (number, case)
        for number, case in enumerate(draw(options.runs, options.seed), start=1)
        if not options.only or number in options.only
    ]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        model = make_model(folder / "model")
        for future in [pool.submit(perform, number, case) for number, case in cases]:
            future.result()
    return 0 if all(not outcome.problems for _, outcome in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
