"""What all tests share: they neither use nor fill the cache of whoever runs them, and see no real accelerator."""

import os
import sys
import tempfile

import pytest

# For the processes that tests start, too. Removed when the tests end.
_folder = tempfile.TemporaryDirectory(prefix="balance_shim-tests-")
os.environ["XDG_CACHE_HOME"] = _folder.name
# Two parts of the tests run at a time on two cores, and models are tiny: a second thread takes time and saves none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most tests are about simulated devices or the CPU. TESTS_USE_ACCELERATORS=1 is for a test that is about real ones.
if not os.environ.get("TESTS_USE_ACCELERATORS"):
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", HIP_VISIBLE_DEVICES="-1", ASCEND_RT_VISIBLE_DEVICES="-1",
                      ZE_AFFINITY_MASK="-1")  # fmt: skip


@pytest.fixture(autouse=True)
def _log_level():
    """Commands that run in the test's process log errors only; the next test logs as usual."""
    yield
    log = sys.modules.get("balance_shim.log")
    if log is not None:
        log.set_level("info")
