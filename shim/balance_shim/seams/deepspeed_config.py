"""`transformers.integrations.deepspeed`: where the last "auto" of a DeepSpeed config becomes a number."""

from collections.abc import Callable
from typing import Any

from ..patching import registry
from ..patching.guard import SeamMoved, insist
from ..versions import version_text
from ..zero import config, moe, session
from ..zero.weights import loading


def apply(module: Any) -> None:
    """Patch `transformers.integrations.deepspeed`.

    Raises:
        SeamMoved: this version completes the config somewhere else.
    """
    owner = getattr(module, "HfTrainerDeepSpeedConfig", None)
    if not callable(getattr(owner, "trainer_config_finalize", None)):
        what = "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig.trainer_config_finalize"
        raise SeamMoved(what, version_text("transformers"))
    registry.replace(owner, "trainer_config_finalize", _around_finalize)


def _around_finalize(original: Callable[..., Any]) -> Callable[..., Any]:
    def trainer_config_finalize(self: Any, args: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
        if session.is_wanted():
            insist("completing the ZeRO-3 config", config.fill_hidden_size, self.config, model)
            insist("choosing the precision", loading.adopt_precision, self, loading.main_dtype(model))
            insist("marking the MoE blocks", moe.mark_leaf_modules, model)
        return original(self, args, model, *rest, **kwargs)

    return trainer_config_finalize
