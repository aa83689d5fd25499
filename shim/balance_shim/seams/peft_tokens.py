"""`peft.tuners.trainable_tokens.layer`: a layer of trainable tokens starts from values of the embedding's weight.

Under ZeRO-3, PEFT before 0.16 indexes the weight that the rank holds, which has no elements (IndexError). Newer
versions collect the values from rank 0 on CUDA by name; without a CUDA device that ends with an AssertionError of
torch's. Gathering gives every rank the same weights, so that none has to be sent them.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import modes
from ..patching import registry

_NAME = "_collect_token_weights"


def apply(module: ModuleType) -> None:
    """Patch `TrainableTokensLayer` where this version of PEFT reads the embedding's weight."""
    layer = getattr(module, "TrainableTokensLayer", None)
    if callable(getattr(layer, _NAME, None)):
        registry.replace(layer, _NAME, _around_collect)
    elif callable(getattr(layer, "update_layer", None)):
        registry.replace(layer, "update_layer", _around_update)


def _around_collect(original: Callable[..., Any]) -> Callable[..., Any]:
    def _collect_token_weights(self: Any, weight: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().reading_tokens(weight) as is_readable:
            if is_readable:
                return weight[rows].detach().clone()
            return original(self, weight, rows, *args, **kwargs)

    return _collect_token_weights


def _around_update(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        with modes.current().reading_weight(getattr(self.get_base_layer(), "weight", None)):
            return original(self, *args, **kwargs)

    return update_layer
