"""Which devices have a fast link, where the machine tells."""

from contextlib import suppress
from itertools import combinations
from typing import Any

from .. import devices


def fast_links(indices: tuple[int, ...]) -> frozenset[frozenset[int]]:
    """Return the pairs among `indices` that NVLink connects; nothing where torch cannot tell.

    torch 2.5 on asks the driver, in a function of its symmetric memory. Links between all devices are none: they
    decide nothing.
    """
    pairs: set[frozenset[int]] = set()
    if devices.accelerator_type() == "cuda":
        with suppress(Exception):  # private, and only on Linux with NVML
            matrix = _nvlinks()
            pairs = {frozenset(pair) for pair in combinations(indices, 2) if matrix[pair[0]][pair[1]]}
    everywhere = len(pairs) == len(indices) * (len(indices) - 1) // 2
    return frozenset() if everywhere else frozenset(pairs)


def _nvlinks() -> Any:
    """Return the number of NVLinks between devices, as a matrix by their indices."""
    from torch._C import _distributed_c10d
    from torch._C._autograd import DeviceType

    detect: Any = vars(_distributed_c10d)["_detect_dma_connectivity"]
    return detect(DeviceType.CUDA, "nvlink").matrix
