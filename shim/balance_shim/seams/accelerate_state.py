"""`accelerate.state`: since 1.13 several processes without accelerators are taken for one, unless they say use_cpu.

With use_cpu, DeepSpeed is left out. So for ZeRO-3 on CPU processes the answer is what it was up to 1.12.
"""

from collections.abc import Callable
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: Any) -> None:
    """Patch `accelerate.state`.

    Raises:
        SeamMoved: this version chooses its backend somewhere else.
    """
    if not callable(getattr(getattr(module, "PartialState", None), "_prepare_backend", None)):
        raise SeamMoved("accelerate.state.PartialState._prepare_backend", version_text("accelerate"))
    registry.replace(module.PartialState, "_prepare_backend", _around_prepare_backend)


def _around_prepare_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend = modes.current().process_backend()
        return backend if backend is not None else original(self, *args, **kwargs)

    return _prepare_backend
