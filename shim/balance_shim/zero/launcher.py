"""`python launcher.py ...`: `torch.distributed.run` with a short farewell, in place of a traceback of its own.

A file that is run, not imported: `relaunch` executes it. It is the parent of all ranks, so what must outlive them is
here: it reads the notes that `watch` has left in files when a rank was aborted before it could say anything.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

GRACE = 10  # seconds that ranks get to end once one of them has failed; torch gives 30, as after a signal from outside


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code for the shell: that of the rank that failed first."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _shorten(api.PContext, SignalException)
    os.environ["BALANCE_SHIM_LAUNCHER"] = str(os.getpid())
    folder = os.environ["BALANCE_SHIM_NOTES"] = tempfile.mkdtemp(prefix="balance_shim.")
    try:
        run.main(list(arguments))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = _explanation(folder)
        how = (
            f"was ended by {failure.signal_name()}"
            if failure.exitcode < 0
            else f"failed (exit code {failure.exitcode})"
        )
        _say(f"error: {reason}" if reason else f"error: rank {rank} {how}; the others have been ended")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        _say(f"ended by {error.sigval.name}")
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shorten(context: Any, signalled: type[BaseException]) -> None:
    """Have ranks end sooner where one has failed; scripts that save on SIGTERM keep the time that torch gives them."""
    close = context.close

    def close_soon(self: Any, death_sig: Any = None, timeout: int = 30) -> None:
        from_outside = isinstance(sys.exc_info()[1], signalled)
        close(self, death_sig, timeout if from_outside else min(timeout, GRACE))

    context.close = close_soon


def _explanation(folder: str) -> str | None:
    from balance_shim import plain_errors
    from balance_shim.zero import notes

    try:
        return plain_errors.refusal(folder) or notes.difference(*notes.read(folder))
    except Exception:  # half-written notes of a rank that was killed
        return None


def _say(text: str) -> None:
    sys.stderr.write(f"balance_shim: {text}\n")


if __name__ == "__main__":
    # Python puts this file's folder first, whose modules have everyday names; the package's own place takes it over.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.exit(main(sys.argv[1:]))
