"""`deepspeed.comm.torch`: on CPU processes it compiles an operation of its own first, which takes a minute.

It needs a compiler, prints to standard output, and speeds up what stays within one machine; gloo does the same.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry


def apply(module: ModuleType) -> None:
    """Patch `deepspeed.comm.torch`. Versions that compile nothing have nothing to patch."""
    if callable(getattr(module, "build_shm_op", None)):
        registry.replace(module, "build_shm_op", _around_build_shm_op)


def _around_build_shm_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_shm_op(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if modes.current().compiles_shared_memory() else None

    return build_shm_op
