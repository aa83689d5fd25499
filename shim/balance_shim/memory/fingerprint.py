"""A text of all properties of a model that determine its memory: the key of its profile in the cache."""

import contextlib
import hashlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any

from ..upstream.model_config import config_text
from ..versions import version_text
from .training_case import TrainingCase, Trains

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")
_PLAIN = (int, float, str, bool, type(None))


def fingerprint(case: TrainingCase) -> list[Any]:
    """Return the parts of the key that follow from the model, its trained parameters, and the batch."""
    model, batch = case.model, case.batch
    return [
        [version_text(package) for package in PACKAGES],
        sys.version_info[:3],
        _config(model),
        _modules(model, case.trains),
        sorted(sorted(group) for group in case.structure.ties),
        _code(model),
        None if batch is None else {name: _tensor(value) for name, value in batch.items()},
    ]


def _config(model: "nn.Module") -> Any:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    return [config_text(config), repr(getattr(config, "_attn_implementation", None))]


def _modules(model: "nn.Module", trains: Trains | None) -> str:
    """Return a digest of the module tree: classes, plain attributes, tensors, hooks and replaced forwards."""

    def trained(name: str, tensor: "Tensor") -> bool:
        return tensor.requires_grad if trains is None else trains(name, tensor)

    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = f"{name}." if name else ""
        state = vars(module)
        plain = [(key, repr(value)) for key, value in state.items() if _is_plain(value)]
        tensors = [
            (key, tuple(tensor.shape), str(tensor.dtype), trained(inside + key, tensor))
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        hooks = [len(registered) for registered in (module._forward_hooks, module._forward_pre_hooks)]
        parts.append((name, _name(type(module)), plain, tensors, hooks, _name(state.get("forward"))))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether `value` is made of numbers, texts and the like, so that its representation is complete."""
    if isinstance(value, _PLAIN):
        return True
    if not depth or not isinstance(value, (list, tuple, dict)):  # the order of a set differs each time
        return False
    inside = [*value.items()] if isinstance(value, dict) else value
    return all(_is_plain(item, depth - 1) for item in inside)


def _code(model: "nn.Module") -> str:
    """Return a digest of the model's code: its files, and functions that replace some of it.

    The files are those of its classes, of their base classes, and of modules in the folders of the user's own classes.
    """
    names = {type(module).__module__ for module in model.modules()}
    bases = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    folders = {os.path.dirname(_file_of(name)) for name in names | bases if _is_of_the_user(name)}
    names |= {
        name for name in list(sys.modules) if _is_of_the_user(name) and os.path.dirname(_file_of(name)) in folders
    }
    code = hashlib.sha256()
    for name in sorted(names):
        module = sys.modules.get(name)
        if name.startswith("torch.") or module is None:
            continue
        with contextlib.suppress(OSError, TypeError):  # typed into an interpreter; its classes' names have to do
            code.update(inspect.getsource(module).encode())
        code.update(repr([(key, _name(value)) for key, value in vars(module).items() if callable(value)]).encode())
    return code.hexdigest()


def _is_of_the_user(module_name: str) -> bool:
    file = _file_of(module_name)
    library = "site-packages" in file or "dist-packages" in file
    return bool(file) and not library and module_name.partition(".")[0] not in (*PACKAGES, *sys.stdlib_module_names)


def _file_of(module_name: str) -> str:
    return getattr(sys.modules.get(module_name), "__file__", None) or ""


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _tensor(value: Any) -> Any:
    """Return the facts of a batch's entry that decide a result: shapes, and the values of integer tensors."""
    if not hasattr(value, "shape"):
        return repr(value)
    numbers = ""
    if not value.is_floating_point() and not value.is_meta and value.numel() <= 1 << 22:
        numbers = hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return [list(value.shape), str(value.dtype), numbers]
