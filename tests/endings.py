"""Waiting for ranks that run, and for their end, in tests of how trainings end."""

import subprocess
import time
from collections.abc import Sequence

import psutil


def wait_for_ranks(process: "subprocess.Popen[str]") -> list[int]:
    """Return the numbers of both ranks' processes, once they are in their second step.

    Each of them writes a line "rank 0 pid 4711 is in step 2" to standard output.
    """
    assert process.stdout is not None and process.stderr is not None
    ranks: list[int] = []
    while len(ranks) < 2:
        line = process.stdout.readline()
        assert line or process.poll() is None, process.stderr.read()[-3000:]
        if " is in step 2" in line:
            ranks.append(int(line.split()[3]))
    return ranks


def expect_end(process: "subprocess.Popen[str]", ranks: Sequence[int], within: float = 30) -> str:
    """Wait until the launcher has ended with an error, and both ranks with it; return what it wrote."""
    _, stderr = process.communicate(timeout=within)
    assert process.returncode not in (0, None)
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [rank for rank in ranks if psutil.pid_exists(rank)]
    assert not left, left
    return stderr
