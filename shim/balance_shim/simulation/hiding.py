"""Keeping real accelerators out of a process that simulates some. Standard library only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Runtimes read these when they are first used, not when torch is imported. No device has such an index.
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ASCEND_RT_VISIBLE_DEVICES": "-1",
    "ZE_AFFINITY_MASK": "-1",
}


@contextlib.contextmanager
def restored_on_failure() -> Iterator[None]:
    """Hide the real accelerators of this process and its children; show them again if the block raises."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(VARIABLES)
    try:
        yield
    except BaseException:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        raise
