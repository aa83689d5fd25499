"""A process that has imported the libraries, on simulated devices or without, and forks for each training.

with Server("4x256MiB") as server:
    answer = server.run({"do": "train", ...}, seconds=60)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CLEAN = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "-1", "HF_HUB_OFFLINE": "1"}

# Imported once, not in each training. DeepSpeed is, where it is installed, because accelerate does so.
PRELOADED = (
    "transformers.models.auto.modeling_auto", "transformers.trainer", "transformers.modeling_utils", "accelerate",
    "deepspeed", "einops", "multiprocessing.queues", "balance_shim.placement.planner",
    "balance_shim.report.plan_report", "balance_shim.training.replan",
    "balance_shim.memory.tracing.measure", "balance_shim.placement.verification",
)  # fmt: skip


class Server:
    """Starts trainings; see `training.py`. A context manager."""

    def __init__(self, machine: str):
        """`machine`: the simulated devices; empty: the CPU."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCE_")}
        environment |= {**CLEAN, "BALANCE_MODE": "off", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'shim'}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sweep.server", machine], env=environment, cwd=REPOSITORY,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, request: dict[str, Any], seconds: int) -> dict[str, Any]:
        """Return the answer to `request`: what the training returned, or "error" and the end of its "log"."""
        self._process.stdin.write(json.dumps({**request, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of the sweep ended with {self._process.wait()}; see its output above")
        return json.loads(line)


def serve(machine: str) -> None:
    """Import the libraries on `machine`, then answer what comes in on standard input, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not be taken for an answer
    import gc
    import importlib

    import torch  # noqa: F401 - has to be there before devices are simulated

    from balance_shim import simulation

    if machine:
        simulation.install(simulation.parse_spec(machine))
    from . import training  # noqa: F401

    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            request["own"] = folder
            child = os.fork()
            if child == 0:
                answers.close()
                _become(request, Path(folder))
            print(json.dumps(_answer(child, request, Path(folder))), file=answers, flush=True)


def _answer(child: int, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    handle = os.pidfd_open(child)
    late = not select.select([handle], [], [], request["seconds"])[0]
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        answer = json.loads((folder / "answer.json").read_text())
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    if late:
        answer = {"error": f"not done in {request['seconds']} s"}
    elif not answer:
        answer = {"error": f"the process ended with {code}"}
    plans = sorted((folder / "report").glob("plan*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if plans:
        plan = json.loads(plans[-1].read_text())
        answer |= {"method": plan.get("method"), "notes": plan.get("notes")}
    return {**answer, "log": log if len(log) < 8000 else f"{log[:4000]}\n...\n{log[-4000:]}"}


def _become(request: dict[str, Any], own: Path) -> None:
    """Answer `request` in this forked process, with the shim armed as it asks for, and end."""
    import traceback

    try:
        file = os.open(own / "log", os.O_WRONLY | os.O_CREAT, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(number, target)
        os.environ |= {"BALANCE_MODE": "off", "BALANCE_REPORT": str(own / "report"), "BALANCE_CACHE": "off"}
        os.environ |= request.get("environment", {})
        from . import training
        from .classes import Candidate

        candidate = Candidate(**request["candidate"])
        try:
            if request["do"] == "make":
                answer = training.make(candidate, Path(request["folder"]))
            else:
                import balance_shim

                balance_shim.install()
                answer = training.train(candidate, Path(request["folder"]), device_map="auto")
        except training.NotTrainable as error:
            answer = {"error": str(error)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": training.short(error)}
        (own / "answer.json").write_text(json.dumps(answer))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # without the server's own exit handlers


if __name__ == "__main__":
    serve(sys.argv[1])
