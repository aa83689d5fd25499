"""`python launcher.py ...`: `torch.distributed.run` with a short farewell, in place of a traceback of its own.

A file that is run, not imported: `relaunch` executes it. It is the parent of all ranks, so what must outlive them is
here: it reads the notes that `desync` has left in files when a rank was aborted before it could log anything, and
tells the rank that has failed from those that have lost it.
"""

import glob
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

GRACE = 10  # seconds that ranks get to end once one of them has failed; torch gives 30, as after a signal from outside
SETTLE = 5.0  # seconds in which the rank that others have lost may still end by itself
ASK_AFTER = 1.0  # seconds, of those, after which ranks that run are asked where they are
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal has come before torch's own handlers were there."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code for the shell: that of the rank that failed first."""
    folder = tempfile.mkdtemp(prefix="balance_shim.")
    try:
        for number in _SIGNALS:
            signal.signal(number, _interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # blocked while this process became the launcher
        return _run(arguments, folder)
    except (Interrupted, KeyboardInterrupt) as error:
        return _ended_by(getattr(error, "signal", signal.SIGINT))
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # an impatient second one must not leave the folder behind
        shutil.rmtree(folder, ignore_errors=True)


def _run(arguments: Sequence[str], folder: str) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["BALANCE_SHIM_LAUNCHER"] = str(os.getpid())
    os.environ["BALANCE_SHIM_NOTES"] = folder
    causes: list[Any] = []
    _keep_quiet()
    _change_context(api, SignalException, folder, causes)
    try:
        run.main(list(arguments))
        return 0
    except ChildFailedError as error:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # all ranks have ended: there is nothing left to interrupt
        rank, failure = error.get_first_failure()
        first = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        message, code = _farewell(folder, causes[0] if causes else None)
        _say(f"error: {message or f'rank {rank} failed (exit code {first}); the others have been ended'}")
        return code or first
    except SignalException as error:
        return _ended_by(error.sigval)


def _change_context(api: Any, signalled: type[BaseException], folder: str, causes: list[Any]) -> None:
    """Have torch find out which rank is the cause before it ends the others, and end them sooner.

    Scripts that save on SIGTERM keep the time that torch gives them after a signal from outside. Ranks start with
    SIGINT blocked, until they are as far as to end without a traceback (`failure_record`).
    """
    close, start = api.PContext.close, api.PContext.start

    def close_soon(self: Any, death_sig: Any = None, timeout: int = 30) -> None:
        if isinstance(sys.exc_info()[1], signalled):
            close(self, death_sig, timeout)
            return
        try:
            causes.append(_settled(self, folder))
        except signalled:
            raise
        except Exception:  # it is for the message only
            pass
        close(self, death_sig, min(timeout, GRACE))

    def start_blocked(self: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    api.PContext.close, api.PContext.start = close_soon, start_blocked


def _settled(context: Any, folder: str) -> Any:
    """Return why ranks have failed, once it is certain, or as sure as it gets; None where none has."""
    from balance_shim.zero.launching import failure_record, root_cause

    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    started, requested = time.monotonic(), False
    while True:
        ends = [
            root_cause.RankEnd(
                rank,
                process.poll(),
                failure_record.read_record(folder, rank),
                tuple(failure_record.read_stack(folder, rank)) if requested and process.poll() is None else (),
            )
            for rank, process in processes.items()
        ]
        if not any(end.exit_code for end in ends):
            return None
        cause = root_cause.judge(ends)
        over = time.monotonic() - started
        if cause.is_certain or over > SETTLE or all(end.exit_code is not None for end in ends):
            return cause
        if not requested and over > ASK_AFTER and failure_record.ASK:
            requested = True
            for end in ends:
                # Only one that has said how it answers: to any other process this signal is the end.
                if end.exit_code is None and os.path.exists(os.path.join(folder, f"{end.rank}.stack")):
                    processes[end.rank].send_signal(failure_record.ASK)
        time.sleep(0.1)


def _farewell(folder: str, cause: Any) -> tuple[str, int]:
    """Return the words on why the ranks have ended, and the exit code; shows the traceback that nothing explains."""
    from balance_shim.zero.divergence import differences, flight_record
    from balance_shim.zero.launching import failure_record

    if cause is not None and cause.kind == "refusal":
        return cause.text, cause.exit_code
    try:
        is_lost = cause is None or not cause.is_certain
        difference = differences.difference(*flight_record.read(folder), is_lost=is_lost)
    except Exception:  # half-written notes of a rank that was killed
        difference = None
    code = cause.exit_code if cause is not None else 0
    if difference:
        is_explained = Path(folder, flight_record.EXPLAINED).exists()
        return ("the ranks have been ended for the reason given above" if is_explained else difference), code
    if cause is None:
        return "", code
    if cause.kind == "communication":
        sys.stderr.write(failure_record.read_traceback(folder, cause.rank))
    return f"{cause.text}; the others have been ended{_recorded()}", code


def _recorded() -> str:
    """Return the files of NCCL's flight recorder with the ranks' last operations, as the end of a sentence."""
    from balance_shim.zero.launching.rank_environment import record_prefix

    prefix = record_prefix(os.getpid())
    if not glob.glob(f"{prefix}*"):
        return ""
    return f"; their last collective operations are in {prefix}*, for torchfrtrace to read"


def _keep_quiet() -> None:
    """Silence torch's launcher about failures that are logged here in one line, unless LOGLEVEL asks for it."""
    if os.environ.get("LOGLEVEL"):
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise Interrupted(number)


def _ended_by(number: signal.Signals) -> int:
    _say(f"ended by {number.name}")
    return 128 + int(number)


def _say(text: str) -> None:
    sys.stderr.write(f"balance_shim: {text}\n")


if __name__ == "__main__":
    # Python puts this file's folder first, whose modules have everyday names; the package's own place takes it over.
    sys.path[0] = str(Path(os.path.abspath(__file__)).parents[3])
    sys.exit(main(sys.argv[1:]))
