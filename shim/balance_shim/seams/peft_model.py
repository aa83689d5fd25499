"""`peft.peft_model`: adapters that the script itself saves, whose parts ZeRO-3 has on all ranks."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: ModuleType) -> None:
    """Patch `peft.peft_model`.

    Raises:
        SeamMoved: this version saves adapters somewhere else.
    """
    if not callable(getattr(getattr(module, "PeftModel", None), "save_pretrained", None)):
        raise SeamMoved("peft.PeftModel.save_pretrained", version_text("peft"))
    registry.replace(module.PeftModel, "save_pretrained", _around_save_pretrained)


def _around_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        return modes.current().save_adapters(original, self, args, kwargs)

    return save_pretrained
