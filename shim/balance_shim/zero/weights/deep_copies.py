"""`copy.deepcopy` of modules with partitioned weights: the copy has whole ones, and nothing of an engine's.

A script copies a model, or a layer, to keep an average or a teacher. What Python copies of a partitioned weight is an
empty tensor, and of an engine's hooks functions that know the original only.
"""

import copy
from typing import Any

# DeepSpeed's own attributes of a module (parameter_offload.py, partition_parameters.py; 0.16 to 0.19).
_OF_ENGINE = (
    "_original_parameters",
    "_external_params",
    "external_parameters",
    "all_parameters",
    "_balance_shim_engine",
)
_PACKAGES = ("deepspeed.", "balance_shim.")


def apply(module: Any) -> None:
    """Give `torch.nn.modules.module.Module` a `__deepcopy__`. To be called once ZeRO-3 has begun."""
    if "__deepcopy__" not in vars(module.Module):
        module.Module.__deepcopy__ = _deepcopy


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Copy as `copy.deepcopy` does for objects without this method, from a state that has no engine in it."""
    reduced = self.__reduce_ex__(4)
    if isinstance(reduced, str):
        return self
    function, arguments, state, *more = (*reduced, None)[:6]
    if isinstance(state, dict) and _is_of_engine(self):
        state = _without_engine(state)
    return copy._reconstruct(self, memo, function, arguments, state, *more[: len(reduced) - 3])  # type: ignore[attr-defined]


def _is_of_engine(module: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _without_engine(state: dict[str, Any]) -> dict[str, Any]:
    copied = {name: value for name, value in state.items() if name not in _OF_ENGINE and not name.startswith("ds_")}
    for name, value in copied.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            copied[name] = type(value)((key, hook) for key, hook in value.items() if not _is_ours(hook))
    copied["_parameters"] = dict(state["_parameters"].items())  # DeepSpeed's class for it knows the module
    return copied


def _is_ours(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps hooks of states
    return str(getattr(function, "__module__", "")).startswith(_PACKAGES)
