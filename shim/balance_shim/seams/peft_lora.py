"""`peft.tuners.lora.model`: adapters that the script merges into weights, which ZeRO-3 partitions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text

_NAME = "_unload_and_optionally_merge"


def apply(module: ModuleType) -> None:
    """Patch the class that `LoraModel` has its merging from.

    Raises:
        SeamMoved: this version merges adapters somewhere else.
    """
    classes = getattr(getattr(module, "LoraModel", None), "__mro__", ())
    owner = next((candidate for candidate in classes if _NAME in vars(candidate)), None)
    if owner is None:
        raise SeamMoved(f"peft.LoraModel.{_NAME}", version_text("peft"))
    registry.replace(owner, _NAME, _around_merge)


def _around_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    def _unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().merging_adapters(self.model):
            return original(self, *args, **kwargs)

    return _unload_and_optionally_merge
