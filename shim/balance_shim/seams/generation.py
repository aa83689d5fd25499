"""`transformers.generation.utils`: `generate`, which ranks with partitioned weights do together."""

from collections.abc import Callable
from typing import Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text


def apply(module: Any) -> None:
    """Patch `transformers.generation.utils`.

    Raises:
        SeamMoved: this version generates somewhere else.
    """
    if not callable(getattr(getattr(module, "GenerationMixin", None), "generate", None)):
        raise SeamMoved("transformers.GenerationMixin.generate", version_text("transformers"))
    registry.replace(module.GenerationMixin, "generate", _around_generate)


def _around_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().generating(self, kwargs):
            return original(self, *args, **kwargs)

    return generate
