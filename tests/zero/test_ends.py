"""How trainings under zero3 end: by signals, by failures, and by ranks that run different modules."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import recipes
from tests.end_to_end.run import SHIM, child_environment
from tests.endings import expect_end, wait_for_ranks
from tests.sampling import sampled

SCRIPTS = Path(__file__).with_name("scripts")
TWO = {**recipes.commands("NCCL time-outs")[0].variables, "BALANCE_NPROC": "2"}


def uneven(fault, folder, timeout="30"):
    """The script with a fault, started; its two ranks and their launcher are in a group of their own."""
    return subprocess.Popen(
        [sys.executable, *SHIM, str(SCRIPTS / "uneven.py"), "--output", str(folder), "--fault", fault],
        env=child_environment({**TWO, "BALANCE_NCCL_TIMEOUT": timeout, "CUDA_VISIBLE_DEVICES": "-1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


ENDS = {
    "killed rank": ("killed", None, 137, "rank 1 was ended by SIGKILL"),
    "failing rank": ("raises", None, 1, "ValueError: a fault of the user's own"),
    "SIGTERM": ("waits", signal.SIGTERM, 143, "ended by SIGTERM"),
    "Ctrl-C": ("waits", signal.SIGINT, 130, "ended by SIGINT"),
    "killed launcher": ("waits", signal.SIGKILL, -9, ""),
}
IN_CI = ("failing rank", "killed rank", "Ctrl-C")


@pytest.mark.parametrize("name", sampled(IN_CI, "failing rank") + sampled(sorted(set(ENDS) - set(IN_CI)), mark="sweep"))
def test_the_end_of_one_is_the_end_of_all(name, tmp_path):
    """Whatever ends first, within 30 seconds nothing is left of it, and the exit code says that it failed."""
    fault, sent, code, message = ENDS[name]
    process = uneven(fault, tmp_path)
    ranks = wait_for_ranks(process)
    if sent is not None:
        os.kill(process.pid, sent)
    stderr = expect_end(process, ranks)
    assert process.returncode == code and message in stderr, stderr[-3000:]


def test_a_rank_that_skips_a_module_is_named(tmp_path):
    """Not only an error of gloo: which rank, which module, and what to do; within the time-out."""
    process = uneven("skip", tmp_path)
    stderr = expect_end(process, wait_for_ranks(process), within=40)
    lines = [line for line in stderr.splitlines() if "ranks run different modules" in line]
    assert len(lines) == 1, stderr[-3000:]
    assert "in step 2: rank 1 skips model.layers.1, which rank 0 runs" in lines[0] and "give each batch" in lines[0]
