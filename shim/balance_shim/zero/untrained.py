"""Models that no Trainer trains, such as a teacher: the script just calls them, and expects whole weights.

Under ZeRO-3 they are loaded in parts, like all others, and only an engine of DeepSpeed's gathers them for each module.
TRL makes one for its reference models. For the rest one is made at the first call.
"""

from typing import Any

from ..seams.guard import insist
from . import config, loops

_ENGINE = "_balance_shim_engine"


def stand_by(model: Any) -> None:
    """Have `model`, which has just been loaded in parts, work when it is called without an engine of its own."""

    def before_first_call(module: Any, args: Any) -> None:
        del args
        handle.remove()
        if not has_engine(module):
            loops.refuse_bare_loop(module)
            insist(f"calling {type(module).__name__}, which no Trainer trains", _give_engine, module)

    handle = model.register_forward_pre_hook(before_first_call)


def has_engine(model: Any) -> bool:
    """Whether DeepSpeed gathers the parameters of `model`, or of a model that it is a part of."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("deepspeed.runtime.zero") for hook in hooks)


def take_down(model: Any) -> None:
    """Remove the engines that `model` or parts of it have got here: now a Trainer gives it one."""
    for module in model.modules():
        engine = vars(module).pop(_ENGINE, None)
        if engine is not None:
            engine.destroy()


def _give_engine(model: Any) -> None:
    import deepspeed

    dtype = next(model.parameters()).dtype
    engine, *_ = deepspeed.initialize(model=model, config=config.for_loading(dtype))
    vars(model)[_ENGINE] = engine  # not as a submodule, which it would be: an engine is a module around the model
