"""`peft.tuners.trainable_tokens.layer`: under ZeRO-3, PEFT 0.19 on collects the tokens' weights on CUDA by name.

Without a CUDA device that ends with an AssertionError of torch's. Gathering gives every rank the same weights, so that
none has to be sent them.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry

_NAME = "_collect_token_weights"


def apply(module: ModuleType) -> None:
    """Patch `TrainableTokensLayer`, in those versions of PEFT that collect weights there."""
    layer = getattr(module, "TrainableTokensLayer", None)
    if callable(getattr(layer, _NAME, None)):
        registry.replace(layer, _NAME, _around_collect)


def _around_collect(original: Callable[..., Any]) -> Callable[..., Any]:
    def _collect_token_weights(self: Any, weight: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().reading_tokens(weight) as is_readable:
            if is_readable:
                return weight[rows].detach().clone()
            return original(self, weight, rows, *args, **kwargs)

    return _collect_token_weights
