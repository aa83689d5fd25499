"""Models that no Trainer trains, such as a teacher: the script just calls them, and expects whole weights.

Under ZeRO-3 they are partitioned, like all others, and only an engine of DeepSpeed's gathers them for each module.
TRL makes one for its reference models. For the rest one is made at the first call, be it of a part of the model.
"""

from typing import TYPE_CHECKING, Any

from ...patching.guard import insist
from .. import calls, config, loops, meeting

if TYPE_CHECKING:
    from torch import nn

# An attribute of the model: a dictionary of engines, which hold their models, would let go of neither.
_ENGINE = "_balance_shim_engine"


def stand_by(model: "nn.Module") -> None:
    """Let a partitioned `model` and each of its modules be called although no engine trains them."""

    def before_first_call(module: Any, args: Any, kwargs: Any) -> Any:
        for handle in handles:
            handle.remove()
        handles.clear()
        if has_engine(module):
            return None
        loops.refuse_bare_loop(module)
        before = set(module._forward_pre_hooks)
        insist(f"calling {type(module).__name__}, which no Trainer trains", _give_engine, model)
        return _run_new_hooks(module, before, args, kwargs)

    handles = [module.register_forward_pre_hook(before_first_call, with_kwargs=True) for module in model.modules()]


def _run_new_hooks(module: Any, before: set[int], args: Any, kwargs: Any) -> Any:
    """Run the hooks that `module` has got while its call had begun, and which torch therefore does not run."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if number in before:
            continue
        if number in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if result is None else result
        else:
            result = hook(module, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    return args, kwargs


def has_engine(model: "nn.Module") -> bool:
    """Whether DeepSpeed gathers the parameters of `model`, or of a model that it is a part of."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("deepspeed.runtime.zero") for hook in hooks)


def take_down(model: "nn.Module") -> None:
    """Remove the engines that `model` or parts of it have got here: now a Trainer gives it one."""
    for module in model.modules():
        engine = vars(module).pop(_ENGINE, None)
        if engine is not None:
            engine.destroy()


def _give_engine(model: "nn.Module") -> None:
    import deepspeed

    meeting.meet(f"a call of {type(model).__name__}")
    dtype = next(model.parameters()).dtype
    engine, *_ = deepspeed.initialize(model=model, config=config.for_loading(dtype))
    calls.watch(model)
    vars(model)[_ENGINE] = engine  # not as a submodule, which it would be: an engine is a module around the model
