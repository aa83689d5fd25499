"""Other ways of spreading a model over devices, which a script or its launcher asks for: refused before anything loads.

The libraries refuse some of them, too, but name DeepSpeed, of which the script has no word.
"""

from collections.abc import Mapping
from typing import Any

from ... import zero_support
from ...upstream import accelerate_launch
from ...upstream.trainer import TrainingArgumentsLike

PLUGINS = ("fsdp_plugin", "megatron_lm_plugin")  # arguments of `Accelerator`


def refuse_in_arguments(arguments: TrainingArgumentsLike, environ: Mapping[str, str]) -> None:
    """Refuse requests of `TrainingArguments` that ZeRO-3 does not go with.

    Raises:
        BalanceError: FSDP, a parallelism config, or a batch size that is to be found.
    """
    _refuse_those_of_launcher(environ)
    fsdp = getattr(arguments, "fsdp", None)
    if fsdp:
        raise zero_support.refusal("fsdp", value=fsdp)
    if getattr(arguments, "parallelism_config", None) is not None:
        raise zero_support.refusal("parallelism_config")
    if getattr(arguments, "auto_find_batch_size", False):
        raise zero_support.refusal("auto_batch")


def refuse_in_accelerator(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Refuse keyword arguments of an `Accelerator` that ZeRO-3 does not go with.

    Raises:
        BalanceError: FSDP, Megatron, or a parallelism config.
    """
    for plugin in PLUGINS:
        if arguments.get(plugin) is not None:
            raise zero_support.refusal("other_plugin", plugin=plugin)
    _refuse_those_of_launcher(environ)
    if arguments.get("parallelism_config") is not None:
        raise zero_support.refusal("parallelism_config")


def _refuse_those_of_launcher(environ: Mapping[str, str]) -> None:
    for variable, way in accelerate_launch.OTHER_WAYS.items():
        if accelerate_launch.asks_for(variable, environ):
            raise zero_support.refusal("accelerate_launch", way=way, variable=variable)
