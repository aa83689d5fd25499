"""One process becomes several: it executes itself again under `torch.distributed.run`, which starts it N times.

By `exec`, so that the launcher has this very process number: signals and exit codes reach who started it, and nobody
is left over. Only a program that was started plainly is treated so, and only once it turns out to be about training.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

from ... import devices, log, simulation, state, zero_support
from ...errors import ZeroError
from ...processes import is_worker
from ...report import events
from ...units import counted
from . import rank_environment, requirements

# Any of these shows that a launcher has started this process, or that it works below one that a launcher has started.
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK",
                 "MV2_COMM_WORLD_RANK")  # fmt: skip
# Programs that start the ranks themselves, and the modules behind them: as they are, and with all that is below them.
# Their other modules (`-m axolotl.cli.train`, `-m trl.scripts.sft`) train.
LAUNCHERS = ("torchrun", "accelerate", "accelerate-launch", "deepspeed", "axolotl", "swift", "megatron",
             "llamafactory-cli", "llamafactory", "lmf", "trl", "ray", "mpirun")  # fmt: skip
LAUNCHER_MODULES = ("accelerate", "axolotl", "deepspeed", "llamafactory", "swift", "trl")
LAUNCHER_PACKAGES = ("torch.distributed", "accelerate.commands", "axolotl.cli.main", "deepspeed.launcher",
                     "llamafactory.cli", "megatron", "ray", "swift.cli", "trl.cli")  # fmt: skip
LAUNCHER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launcher.py")
NOTEBOOKS = ("ipykernel", "ipykernel_launcher", "IPython", "ipython", "ipython3", "jupyter")


class Unrepeatable(Exception):
    """The command of this process cannot be executed as several processes; the message gives the reason."""


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several, or as the only one."""
    return any(environ.get(name, "").strip() for name in OF_A_LAUNCHER) or steps_of_slurm(environ) > 1


def steps_of_slurm(environ: Mapping[str, str]) -> int:
    """Return how many tasks `srun` has started with this one, itself included; 0 where it has not.

    The batch script of a job (`sbatch`) has the job's number of tasks in its environment as well, but is one process.
    """
    if not environ.get("SLURM_PROCID", "").isdigit():
        return 0
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks:
        step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
        tasks = environ.get("SLURM_NTASKS", "") if step.isdigit() and int(step) < _BATCH_STEP else ""
    return int(tasks) if tasks.isdigit() else 1


_BATCH_STEP = 0xFFFFFF00  # numbers from here on are SLURM's own steps: batch, extern, interactive (slurm.h)


def has_own_launcher(arguments: Sequence[str]) -> bool:
    """Whether this is the command of a program that starts the ranks itself. `arguments`: `sys.orig_argv`."""
    try:
        named = program(arguments)
    except Unrepeatable:
        return False
    place = _script_place(named)
    if named[place].startswith("-"):
        _, joined = _last_option(named[place])
        module = joined or named[place + 1]
        return module in LAUNCHER_MODULES or any(
            f"{module}.".startswith(f"{package}.") for package in LAUNCHER_PACKAGES
        )
    name = os.path.basename(named[place])
    return name in LAUNCHERS and not (name == "axolotl" and _trains_itself(named[place + 1 :]))


def _trains_itself(options: Sequence[str]) -> bool:
    """Whether axolotl's command trains in its own process, by its option `--launcher python` (0.19)."""
    return "--launcher=python" in options or ("--launcher", "python") in pairwise(options)


@lru_cache(maxsize=1)
def is_launcher() -> bool:
    """Return whether this process starts the ranks, and is none itself."""
    return not is_launched(os.environ) and not is_worker() and has_own_launcher(sys.orig_argv)


def program(command_line: Sequence[str]) -> list[str]:
    """Return the arguments of the interpreter that run the program again: its own options first.

    Args:
        command_line: `sys.orig_argv`; `sys.argv` has lost the options, and at start the module's name too.

    Raises:
        Unrepeatable: there is no program that could be run again: `-c`, standard input, a prompt, a notebook.
    """
    arguments = list(command_line[1:])
    place = _script_place(arguments)
    if place >= len(arguments):
        raise Unrepeatable(zero_support.sentence("interactive"))
    target = arguments[place]
    if target == "-":
        raise Unrepeatable(zero_support.sentence("standard_input"))
    if target.startswith("-"):
        letter, rest = _last_option(target)
        if letter == "c":
            raise Unrepeatable(zero_support.sentence("python_c"))
        if not rest:
            place += 1
        module = rest or (arguments[place] if place < len(arguments) else "")
        if module.partition(".")[0] in NOTEBOOKS:
            raise Unrepeatable(zero_support.sentence("notebook"))
    elif os.path.basename(target) in NOTEBOOKS:
        raise Unrepeatable(zero_support.sentence("notebook"))
    return arguments


def command(command_line: Sequence[str], count: int, environ: Mapping[str, str]) -> list[str]:
    """Return the command that starts the program of `command_line` (`sys.orig_argv`) `count` times on this machine.

    Raises:
        Unrepeatable: see `program`.
    """
    if environ.get("MASTER_PORT", "").strip():
        rendezvous = [f"--master-addr={environ.get('MASTER_ADDR', '').strip() or '127.0.0.1'}",
                 f"--master-port={environ['MASTER_PORT'].strip()}"]  # fmt: skip
    else:
        rendezvous = ["--standalone"]  # a free port is looked for
    # --no-python: the ranks get the interpreter's options too, which torch.distributed.run would drop.
    return [sys.executable, LAUNCHER, *rendezvous, f"--nproc-per-node={count}", "--no-python",
            sys.executable, *program(command_line)]  # fmt: skip


def ensure_launched() -> None:
    """Execute this process again as several, unless it is one of several already.

    Raises:
        ZeroError: that is asked for and not possible.
    """
    if simulation.is_active():
        raise zero_support.refusal("simulated")
    if is_launched(os.environ):
        note_ignored_count(os.environ)
        return
    if is_worker():  # it works for a process that has its ranks, or it will be started again with that process
        return
    if has_own_launcher(sys.orig_argv):
        return
    requirements.check()
    count = process_count()
    if count == 1 and state.settings().nproc is None and state.settings().offload == "none":
        raise zero_support.refusal("one_device")
    accelerator = devices.accelerator_type()
    try:
        become(count, f"ZeRO-3, {'on the CPU' if accelerator is None else f'one for each {accelerator}'}")
    except Unrepeatable as error:
        raise ZeroError(f"BALANCE_MODE=zero3: {error}") from None


def become(count: int, purpose: str) -> NoReturn:
    """Execute this process again as the launcher of `count` ranks.

    Args:
        purpose: the reason for them, for people.

    Raises:
        Unrepeatable: see `program`; or MASTER_PORT is not a port, or is in use.
    """
    argv = command(sys.orig_argv, count, os.environ)
    _check_port(os.environ)
    log.info(f"starting {counted(count, 'process')} for {purpose}")
    _become(argv, {**threads_for(count), **rank_environment.variables(os.environ)})


def note_ignored_count(environ: Mapping[str, str]) -> None:
    """Log, on the first rank of this machine, that another launcher has started more or fewer than BALANCE_NPROC."""
    wanted, there = state.settings().nproc, environ.get("LOCAL_WORLD_SIZE") or environ.get("WORLD_SIZE") or "1"
    own_launcher = environ.get("BALANCE_SHIM_LAUNCHER")
    if wanted is not None and not own_launcher and there != str(wanted) and environ.get("LOCAL_RANK", "0") == "0":
        log.once("warning", zero_support.sentence("nproc_ignored", wanted=wanted, there=there))


def process_count() -> int:
    """Return how many processes to start on this machine: BALANCE_NPROC, or one for each device.

    Raises:
        ZeroError: nothing tells how many.
    """
    available = devices.count()
    count = state.settings().nproc or available
    if count < 1:
        raise zero_support.refusal("no_accelerator")
    if count > available > 0:
        raise zero_support.refusal("nproc_above_devices", count=count, devices=available)
    return count


def threads_for(count: int) -> dict[str, str]:
    """Return the variables that share this machine's cores among `count` processes, where these compute on the CPU.

    They do without accelerators, and in the optimizer's step where its state is kept in host memory.
    """
    on_host = devices.accelerator_type() is None or state.settings().offload != "none"
    return cpu_threads(count) if on_host else {}


def cpu_threads(count: int) -> dict[str, str]:
    """Return variables that share the machine's cores among `count` processes; torch.distributed.run gives each one."""
    if os.environ.get("OMP_NUM_THREADS", "").strip():
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // count))}


def _become(command: list[str], variables: Mapping[str, str]) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    folder = state.folder_at_start()
    if folder is not None and os.path.isdir(folder):  # a relative path of the script is relative to this
        os.chdir(folder)
    # Until the launcher can end without a traceback; it unblocks them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    own_variables = {state.SETTINGS_SAID: "1", events.BEGAN: f"{events.began():.3f}"}
    os.execve(command[0], command, {**os.environ, **variables, **own_variables})


def _check_port(environ: Mapping[str, str]) -> None:
    text = environ.get("MASTER_PORT", "").strip()
    if not text:
        return
    host = environ.get("MASTER_ADDR", "").strip() or "127.0.0.1"
    if not (text.isdigit() and 0 < int(text) < 65536):
        raise Unrepeatable(zero_support.sentence("no_port", port=text))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(text)))
        except OSError as error:
            reason = zero_support.sentence("port_in_use", port=text, host=host, reason=error.strerror)
            raise Unrepeatable(reason) from None


def _script_place(arguments: Sequence[str]) -> int:
    """Return where among the interpreter's arguments the program stands: a path, "-", "-m..." or "-c..."."""
    place = 0
    while place < len(arguments):
        argument = arguments[place]
        if not argument.startswith("-") or argument == "-":
            return place
        if argument.startswith("--"):
            place += 2 if argument == "--check-hash-based-pycs" else 1
            continue
        letter, rest = _last_option(argument)
        if letter in ("m", "c"):
            return place
        place += 2 if letter in ("W", "X") and not rest else 1
    return place


def _last_option(argument: str) -> tuple[str, str]:
    """Return the letter in `word`, such as "-um", that takes an argument, and the argument if it stands there too."""
    for place, letter in enumerate(argument[1:], start=2):
        if letter in "mcWX":
            return letter, argument[place:]
    return "", ""
