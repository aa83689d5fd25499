"""transformers 4.50 to 4.53 take device_map="auto" for tensor parallelism when WORLD_SIZE is set, even to 1."""

import os
from collections.abc import Callable
from typing import Any

from ..versions import version_of

TENSOR_PARALLEL_TRAP = ((4, 50), (4, 54))


def untrapped(kwargs: dict[str, Any], has_own_devices: Callable[[], bool]) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` such that a device map is made where one is asked for.

    Args:
        has_own_devices: whether this process has devices of its own to place the model on.
    """
    oldest, fixed = TENSOR_PARALLEL_TRAP
    is_trapped = oldest <= version_of("transformers") < fixed and os.environ.get("WORLD_SIZE")
    if kwargs.get("device_map") == "auto" and is_trapped and has_own_devices():
        return {**kwargs, "device_map": "balanced"}  # means the same, and is not taken for tensor parallelism
    return kwargs
