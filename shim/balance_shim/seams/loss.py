"""Seam 2c, `transformers.loss.loss_utils`: 4.50 to 4.52 divide a loss by a token count on another device.

Later versions move the count to the loss. It reaches the model's forward as a tensor, and accelerate's hooks move that
to the first device, so it has to be moved here, beside the division.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_of, version_text

DIVIDES_AS_IT_IS = ((4, 50), (4, 53))


def apply(module: ModuleType) -> None:
    """Patch `transformers.loss.loss_utils` where it is needed.

    Raises:
        SeamMoved: a version that needs it has no such function.
    """
    oldest, fixed = DIVIDES_AS_IT_IS
    if not oldest <= version_of("transformers") < fixed:
        return
    if not callable(getattr(module, "fixed_cross_entropy", None)):
        raise SeamMoved("transformers.loss.loss_utils.fixed_cross_entropy", version_text("transformers"))
    registry.replace(module, "fixed_cross_entropy", _around_cross_entropy)


def _around_cross_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    def fixed_cross_entropy(source: Any, target: Any, num_items_in_batch: Any = None, *args: Any, **kwargs: Any) -> Any:
        if hasattr(num_items_in_batch, "device") and num_items_in_batch.device != source.device:
            num_items_in_batch = num_items_in_batch.to(source.device)
        return original(source, target, num_items_in_batch, *args, **kwargs)

    return fixed_cross_entropy
