"""Models whose code is replaced by kernels of other packages: in a trace the code of their own classes runs.

Kernels written in Triton or CUDA do not run on shapes. Liger (`use_liger_kernel=True`) and `kernels` bind methods to
modules of a model, replace functions and classes in the module that defines it, and the forward of its class; FLA,
causal-conv1d and mamba-ssm are picked where they are installed. What their plain counterparts keep is a little more.
"""

import contextlib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

from torch import nn

# The packages whose functions and classes are kernels.
PACKAGES = frozenset({"liger_kernel", "kernels", "unsloth", "unsloth_zoo", "fla", "causal_conv1d", "mamba_ssm"})
_LIBRARIES = frozenset({"builtins", "torch", "peft", "accelerate", "trl", "swift", "bitsandbytes", *PACKAGES})
_CHOOSES = "hub_kernels.py"  # where transformers chooses between a package's function and the one that it decorates
_LIGERS_LOSS = "lce_forward"  # of the model: head and loss in one, which never has all logits
_with_fused_loss: "WeakSet[nn.Module]" = WeakSet()


def strip_kernels(model: nn.Module) -> None:
    """Let every module of `model`, a copy, run the forward of its own class again."""
    homes = _homes(model)
    for module in model.modules():
        kind, bound = type(module), vars(module).get("forward")
        forward = getattr(bound, "__func__", None) or getattr(kind, "forward", None)
        if getattr(forward, "__name__", "") == _LIGERS_LOSS and _is_kernel(forward):
            _with_fused_loss.add(model)
        if isinstance(bound, MethodType) and (_is_kernel(bound) or hasattr(kind, "kernel_layer_name")):
            del module.forward
        if _is_kernel(kind):
            _make_plain(module, homes)
        elif _is_kernel(getattr(kind, "forward", None)) and "forward" not in vars(module):
            plain = getattr(_as_written(kind.__module__), kind.__name__)
            module.forward = MethodType(plain.forward, module)
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and name != "forward" and _is_kernel(value):
                setattr(module, name, getattr(sys.modules[kind.__module__], f"torch_{name}", None))


def fuses_loss(model: nn.Module) -> bool:
    """Whether kernels that `strip_kernels` has taken off compute the loss without ever having all logits."""
    return model in _with_fused_loss


@contextlib.contextmanager
def plain_functions(model: nn.Module) -> Iterator[None]:
    """Let the modules that define `model` call their own functions in the body of the context."""
    undo: list[tuple[ModuleType, str, Any]] = []
    try:
        for home in _homes(model):
            for name, value in list(vars(home).items()):
                plain = _plain_function(home, name, value)
                if plain is not None:
                    undo.append((home, name, value))
                    setattr(home, name, plain)
        yield
    finally:
        for home, name, value in undo:
            setattr(home, name, value)


def _plain_function(home: ModuleType, name: str, value: Any) -> Any:
    """Return the replacement of the function `home.name`; None if it is no kernel."""
    if not isinstance(value, FunctionType):
        return None
    if value.__code__.co_filename.endswith(_CHOOSES) and hasattr(value, "__wrapped__"):
        return _tolerant(value.__wrapped__)
    if _is_kernel(value) and value.__module__ != home.__name__:
        return getattr(_as_written(home.__name__), name, None)
    return None


def _tolerant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, made to accept and ignore keyword arguments that only its counterpart in a package has."""
    accepted = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def tolerant(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{name: value for name, value in kwargs.items() if name in accepted})

    return tolerant


def _make_plain(module: nn.Module, homes: list[ModuleType]) -> None:
    """Turn a module of a kernel's class into one of the class whose place that has taken."""
    kind = type(module)
    for home in homes:
        names = [name for name, value in vars(home).items() if value is kind]
        written = _as_written(home.__name__)
        # FLA's gated norm is chosen in the body of a layer and stands nowhere in place of the library's.
        ending = kind.__name__.removeprefix("Fused")
        names += [name for name in vars(written) if name.endswith(ending) and not names]
        plain = next((vars(written).get(name) for name in names if not _is_kernel(vars(written).get(name))), None)
        if isinstance(plain, type):
            _complete(module, plain)
            module.__class__ = plain
            return


def _complete(module: Any, plain: type) -> None:
    """Add the attributes that modules of the class `plain` have beyond those of a kernel's class."""
    own = vars(module)
    if "eps" in own:
        own.setdefault("variance_epsilon", own["eps"])
    if "config" in own and "act_fn" not in own:
        from transformers.activations import ACT2FN

        module.act_fn = ACT2FN[getattr(own["config"], "hidden_act", "silu")]


def _homes(model: nn.Module) -> list[ModuleType]:
    """Return the modules that define the classes in `model`: of libraries only those that define models."""
    names = dict.fromkeys(base.__module__ for module in model.modules() for base in type(module).__mro__)
    modules = [sys.modules.get(name) for name in names if _defines_models(name)]
    return [home for home in modules if home is not None]


def _defines_models(module_name: str) -> bool:
    if module_name.startswith("transformers."):
        return module_name.startswith("transformers.models.")
    return module_name.partition(".")[0] not in _LIBRARIES


def _is_kernel(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in PACKAGES


@functools.lru_cache
def _as_written(name: str) -> ModuleType:
    """Return the module `name` as its source has it, run once more and kept to ourselves."""
    original = sys.modules[name]
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    fresh.__package__ = original.__package__
    spec.loader.exec_module(fresh)
    return fresh
