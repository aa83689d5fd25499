"""`model.device`: where inputs arrive, also where the first parameter, which the library looks at, is elsewhere."""

from collections.abc import Callable
from typing import Any

from ..placement import align_hooks, placed_models


def around_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for the getter of `PreTrainedModel.device`.

    Under the library's own maps the first parameter is on the device where inputs arrive, and outputs return to it. So
    scripts put inputs, and heads of their own, on `model.device`.
    """

    def device(self: Any) -> Any:
        own = original(self)
        first_device = placed_models.first_device_of(self)
        # Without accelerate's hooks it is an ordinary model, and may have been moved as one; so it has on the host.
        if first_device is None or own.index in (None, first_device) or not align_hooks.hooks_of(self):
            return own
        return type(own)(own.type, first_device)

    return device
