"""Which of several failed ranks is the cause: the one that failed by itself, not those that lost it."""

import faulthandler
import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from balance_shim.zero.launching import failure_record
from balance_shim.zero.launching.failure_record import FailureRecord, Frame
from balance_shim.zero.launching.root_cause import RankEnd, judge
from tests.end_to_end.run import child_environment

LOST = FailureRecord(10.0, "RuntimeError", "Connection closed by peer", "", True)
OWN = FailureRecord(11.0, "ValueError", "a fault", "train.py:3, in step", False)
REFUSED = FailureRecord(12.0, "", "BALANCE_MODE=zero3: refused", "", False)
ASLEEP = (Frame("/home/me/train.py", 7, "main"),)
WAITING = (Frame("/lib/torch/distributed/distributed_c10d.py", 9, "all_reduce"), *ASLEEP)

ENDS = {
    "an exception, although the other rank failed before": (
        [RankEnd(0, 1, LOST), RankEnd(1, 1, OWN)], "exception", 1,
        "rank 1 failed with ValueError: a fault (train.py:3, in step)",
    ),
    "an exception of a rank that is not down yet": (
        [RankEnd(0, 1, LOST), RankEnd(1, None, OWN)], "exception", 1, "rank 1 failed with ValueError",
    ),
    "a refusal is shown as it is": (
        [RankEnd(0, 1, LOST), RankEnd(1, 1, REFUSED)], "refusal", 1, "BALANCE_MODE=zero3: refused",
    ),
    "an exit code of its own": ([RankEnd(0, 1, LOST), RankEnd(1, 4)], "exit", 4, "rank 1 ended with exit code 4"),
    "a signal": ([RankEnd(0, 1, LOST), RankEnd(1, -9)], "signal", 137, "rank 1 was ended by SIGKILL"),
    "no abort, which another rank has caused": (
        [RankEnd(0, -6), RankEnd(1, 4)], "exit", 4, "rank 1 ended with exit code 4",
    ),
    "a rank that came to the end": ([RankEnd(0, 1, LOST), RankEnd(1, 0)], "finished", 1, "rank 1 came to the end"),
    "a rank that let the others wait": (
        [RankEnd(0, 1, LOST), RankEnd(1, None, None, ASLEEP), RankEnd(2, None, None, WAITING)], "late", 1,
        "rank 1 kept others waiting for longer than the time-out: rank 1 is at train.py:7, in main",
    ),
    "nothing but lost ranks": (
        [RankEnd(0, 1, LOST), RankEnd(1, None, None, WAITING)], "communication", 1, "rank 0 lost the others",
    ),
    "an abort alone": ([RankEnd(0, -6), RankEnd(1, None)], "unknown", 134, "rank 0 was ended by SIGABRT"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_the_cause_of_an_end(name):
    """By exit codes, records, and where ranks are that still run; the exit code is the cause's own."""
    ends, kind, code, text = ENDS[name]
    cause = judge(ends)
    assert (cause.kind, cause.exit_code) == (kind, code) and cause.text.startswith(text), cause


def test_errors_that_other_ranks_have_caused():
    """A real error of torch's store is one, whatever it is wrapped in; an error of the script's own is none."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as caught:
        store.wait(["never"], timedelta(seconds=0.1))
    assert failure_record.is_communication(caught.value)
    wrapped = ValueError("loading failed")
    wrapped.__cause__ = caught.value
    assert failure_record.is_communication(wrapped)
    assert not failure_record.is_communication(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


RANK = """
import os, sys
sys.path.insert(0, {shim!r})
os.environ["BALANCE_SHIM_LAUNCHER"] = str(os.getppid())
from balance_shim.zero.launching.failure_record import leave_word
leave_word()
{body}
"""


def rank(folder, body):
    """Run `body` in a process that takes this one for the launcher of its rank 1."""
    from tests.end_to_end.run import REPOSITORY

    code = RANK.format(shim=str(REPOSITORY / "shim"), body=body)
    environment = child_environment({"BALANCE_SHIM_NOTES": str(folder), "RANK": "1"})
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_exception_of_the_scripts_is_recorded_and_shown(tmp_path):
    """Its traceback stays; the launcher reads type, text and place."""
    done = rank(tmp_path, "def step():\n    raise ValueError('a\\nfault')\nstep()")
    record = failure_record.read_record(str(tmp_path), 1)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert (record.kind, record.message, record.is_communication) == ("ValueError", "a fault", False)
    assert record.place.endswith("in step")


def test_what_another_rank_has_caused_is_left_to_the_launcher(tmp_path):
    """Nothing is shown where the process is one of several; the traceback is there if nothing else explains the end."""
    done = rank(tmp_path, "raise RuntimeError('[gloo/transport/tcp/pair.cc:1] Connection closed by peer')")
    assert done.returncode == 1 and done.stderr == ""
    assert failure_record.read_record(str(tmp_path), 1).is_communication
    assert "Connection closed by peer" in failure_record.read_traceback(str(tmp_path), 1)


def test_an_interrupt_is_left_to_the_launcher(tmp_path):
    """Ctrl-C reaches each rank; only the launcher says so."""
    done = rank(tmp_path, "import signal; os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_where_a_rank_is(tmp_path):
    """Asked by a signal, Python itself writes the stack of the main thread, which is read back."""
    with open(tmp_path / "0.stack", "w") as file:
        faulthandler.register(failure_record.ASK, file=file, all_threads=False)
        try:
            os.kill(os.getpid(), failure_record.ASK)
        finally:
            faulthandler.unregister(failure_record.ASK)
    stack = failure_record.read_stack(str(tmp_path), 0)
    assert stack[0].function == "test_where_a_rank_is" and str(stack[0]).startswith("test_root_cause.py:")
    assert not failure_record.waits_for_others(stack)
