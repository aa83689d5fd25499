"""transformers 4.50 to 4.53 turn device_map="auto" into tensor parallelism when WORLD_SIZE is set, even to 1."""

import os
from typing import Any

from ..versions import version_of

TENSOR_PARALLEL_TRAP = ((4, 50), (4, 54))


def untrapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` such that a device map is made where one is asked for."""
    oldest, fixed = TENSOR_PARALLEL_TRAP
    is_trapped = oldest <= version_of("transformers") < fixed and os.environ.get("WORLD_SIZE") == "1"
    if kwargs.get("device_map") == "auto" and is_trapped:
        return {**kwargs, "device_map": "balanced"}  # means the same, and is not taken for tensor parallelism
    return kwargs
