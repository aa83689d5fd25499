"""Runs scripts on simulated devices, each in a process of its own, many of them in little time.

Half of the time of a short simulated run goes into importing the libraries. So one server a machine imports them once,
on the simulated devices, and forks for each run; a run is then what it would be under `balance-shim simulate
--shapes-only`, which `Simulator(cold=True)` calls instead.

    with Simulator() as simulator:
        run = simulator.run("4x80GiB", ["benchmarks/train.py", folder], {"BALANCE_MODE": "off"})
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.end_to_end.run import HIDDEN_ACCELERATORS, child_environment  # noqa: E402 - needs the path

TIME_LIMIT = 900  # seconds of one run
MODULES = (
    "accelerate", "peft", "transformers", "transformers.trainer", "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.internvl.modeling_internvl", "transformers.models.auto.modeling_auto",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        status: "ok", "oom" (it ended for lack of memory on a device), or "failed".
        peaks: bytes that each device held at most, from the first step on where the script lets them start again there.
        reserved_peaks: bytes that the allocator of each device reserved at most for them.
        loading_peaks: the same as `peaks` before the first step, if the script prints them.
        plan: the last `plan.json` that the shim wrote, if it made a plan.
        device_map: the map that the model says it has when the script ends.
        step_time: of a training step by the clock, as in plans; None where the kind of a device is unknown.
        seconds: of the run alone.
        log: what it wrote to standard output and standard error.
    """

    status: str
    peaks: list[int]
    reserved_peaks: list[int]
    loading_peaks: list[int] | None
    plan: dict[str, Any] | None
    device_map: dict[str, Any] | None
    step_time: dict[str, Any] | None
    seconds: float
    log: str


class Simulator:
    """Starts runs. A context manager, because it keeps a server for each machine that was used."""

    def __init__(self, cold: bool = False):
        """`cold`: start each run from nothing, by the command that users have."""
        self._cold = cold
        self._servers: dict[str, _Server] = {}
        # What the shim finds out about a model serves the next run, but none from before.
        self._cache = tempfile.TemporaryDirectory()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.stop()
        self._cache.cleanup()

    def run(self, machine: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> Run:
        """Run `command`, a script and its arguments, on `machine` ("4x80GiB"), with shapes only.

        `variables` are set in its environment, which has no other `BALANCE_*` variables.
        """
        with tempfile.TemporaryDirectory() as folder:
            environment = {**(variables or {}), "BALANCE_REPORT": str(Path(folder, "report"))}
            environment.setdefault("BALANCE_MODE", "balanced")
            environment.setdefault("BALANCE_CACHE", self._cache.name)
            log = Path(folder, "log")
            start = time.monotonic()
            if self._cold:
                code = _run_cold(machine, command, environment, folder, log)
            else:
                if machine not in self._servers:
                    self._servers[machine] = _Server(machine)
                    start = time.monotonic()
                code = self._servers[machine].run(command, environment, folder, log)
            return _read(Path(folder), code, time.monotonic() - start)


def _run_cold(machine, command, environment, folder, log) -> int:
    command_line = ["-m", "balance_shim", "simulate", "--gpus", machine, "--shapes-only", *command]
    with open(log, "wb") as file:
        done = subprocess.run(
            [sys.executable, *command_line], env=_environment(environment), cwd=folder, stdin=subprocess.DEVNULL,
            stdout=file, stderr=file, timeout=TIME_LIMIT,
        )  # fmt: skip
    return done.returncode


class _Server:
    """A process that has imported the libraries on a simulated machine, and forks a run at each line it is sent."""

    def __init__(self, machine: str):
        # BALANCE_MODE=off: the server only simulates; each run arms the shim, or leaves it off, by its own variables.
        self._process = subprocess.Popen(
            [sys.executable, __file__, machine], env=_environment({"BALANCE_MODE": "off"}), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: str, log: Path) -> int:
        request = {"command": list(command), "environment": dict(environment), "folder": folder, "log": str(log)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> int:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of simulated runs ended with {self._process.wait()}; see its output above")
        return int(line)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    # One thread: there are no numbers to compute, and threads of small operations wait for each other.
    return child_environment({**HIDDEN_ACCELERATORS, "OMP_NUM_THREADS": "1", **variables})


def _read(folder: Path, code: int, seconds: float) -> Run:
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    report = folder / "report"
    record = _json(report / "simulation.json") or []
    # A plan that is made again once more is known gets a file of its own.
    plans = sorted(report.glob("plan*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def printed(name: str) -> Any:
        match = re.search(rf'^\{{"{name}": .*\}}$', log, re.MULTILINE)
        return json.loads(match[0])[name] if match else None

    return Run(
        status="ok" if code == 0 else "oom" if "OutOfMemoryError" in log else "failed",
        peaks=[device["peak"] for device in record],
        reserved_peaks=[device.get("reserved_peak", device.get("peak_reserved", 0)) for device in record],
        loading_peaks=printed("loading_peaks"),
        plan=_json(plans[-1]) if plans else None,
        device_map=printed("hf_device_map"),
        step_time=_json(report / "step_time.json"),
        seconds=round(seconds, 1),
        log=log,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def serve(machine: str) -> None:
    """Import the libraries on `machine`, then run what comes in on standard input, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not be taken for an answer
    import gc
    import importlib

    import torch  # noqa: F401 - has to be there before devices are simulated

    from balance_shim import simulation

    simulation.install(simulation.parse_spec(f"{machine}:shapes"))
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the runs need not look at what was imported again and again
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            _become_run(**json.loads(line))
        print(_waited(child), file=answers, flush=True)


def _waited(child: int) -> int:
    """Return the exit code of `child`, ended if it takes too long."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], TIME_LIMIT)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become_run(command: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Run the script in this forked process, with the shim armed as the environment has it, and end."""
    import runpy
    import traceback

    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(number, target)
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = list(command)
        sys.path[0] = os.path.dirname(command[0])  # as Python has it for a script
        import balance_shim
        from balance_shim import simulation

        balance_shim.install()
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        # As the shim does at the end of a process that was simulated from its start.
        record = [device._asdict() for device in simulation.usage()]
        report = Path(environment["BALANCE_REPORT"])
        report.mkdir(parents=True, exist_ok=True)
        (report / "simulation.json").write_text(json.dumps(record), encoding="utf-8")
        step_time = simulation.step_time()
        if step_time is not None:
            (report / "step_time.json").write_text(json.dumps(step_time.to_json()), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        code = code or 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the server's own exit handlers, and without taking a large model apart


if __name__ == "__main__":
    serve(sys.argv[1])
