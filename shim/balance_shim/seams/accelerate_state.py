"""`accelerate.state`: the backend and the device of this process.

Since accelerate 1.13 several processes without accelerators are taken for one, unless they say use_cpu. With use_cpu,
DeepSpeed is left out. So for ZeRO-3 on CPU processes the answer is what it was up to 1.12.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `accelerate.state`.

    Raises:
        SeamMoved: this version chooses its backend somewhere else.
    """
    for name in ("_prepare_backend", "set_device"):
        if not callable(getattr(getattr(module, "PartialState", None), name, None)):
            raise SeamMoved(f"accelerate.state.PartialState.{name}", version_text("accelerate"))
    registry.replace(module.PartialState, "_prepare_backend", _around_prepare_backend)
    registry.replace(module.PartialState, "set_device", _around_set_device)


def _around_prepare_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend = modes.current().process_backend()
        return backend if backend is not None else original(self, *args, **kwargs)

    return _prepare_backend


def _around_set_device(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        modes.current().after_device_choice(self)
        return result

    return set_device
