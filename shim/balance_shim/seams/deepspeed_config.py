"""`transformers.integrations.deepspeed`: where the last "auto" of a DeepSpeed config becomes a number."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import modes
from ..patching import registry
from ..patching.guard import SeamMoved
from ..versions import version_text

if TYPE_CHECKING:
    from torch import nn


def apply(module: ModuleType) -> None:
    """Patch `transformers.integrations.deepspeed`.

    Raises:
        SeamMoved: this version completes the config somewhere else.
    """
    owner = getattr(module, "HfTrainerDeepSpeedConfig", None)
    if not callable(getattr(owner, "trainer_config_finalize", None)):
        function_name = "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig.trainer_config_finalize"
        raise SeamMoved(function_name, version_text("transformers"))
    registry.replace(owner, "trainer_config_finalize", _around_finalize)


def _around_finalize(original: Callable[..., Any]) -> Callable[..., Any]:
    def trainer_config_finalize(self: Any, args: Any, model: "nn.Module", *rest: Any, **kwargs: Any) -> Any:
        modes.current().before_engine_config(self, model)
        return original(self, args, model, *rest, **kwargs)

    return trainer_config_finalize
