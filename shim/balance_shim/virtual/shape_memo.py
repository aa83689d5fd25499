"""Shapes of results that were computed before.

Many of torch's meta kernels are Python: with 2.13 `add` takes 0.1 ms and `log_softmax` 0.5 ms. A model of equal layers
calls them with the same shapes again and again, and a plan that tries several maps does so with whole models.
"""

from typing import Any

import torch

META = torch.device("meta")
MOST_ENTRIES = 50_000  # a model of one kind of layer has some hundreds

# Arguments that are compared by value. Other objects, such as generators, are not looked up.
_VALUES = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)
_pure: dict[Any, bool] = {}
_results: dict[Any, Any] = {}


class _NotComparable(Exception):
    """An argument or a result cannot be described by values."""


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)` of meta tensors; a call with the same shapes is not repeated.

    Operations that write to an argument or return a view of one are always run.
    """
    pure = _pure.get(func)
    if pure is None:
        schema = func._schema
        pure = _pure[func] = all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))
    if not pure:
        return func(*args, **kwargs)
    try:
        key = (
            func,
            torch.get_default_dtype(),
            _key(args),
            tuple([(name, _key(value)) for name, value in kwargs.items()]),
        )
    except _NotComparable:
        return func(*args, **kwargs)
    result = _results.get(key)
    if result is not None:
        return _made(result)
    out = func(*args, **kwargs)
    try:
        result = _described(out, _storages((args, tuple(kwargs.values()))))
    except _NotComparable:
        return out
    if len(_results) >= MOST_ENTRIES:
        _results.clear()
    _results[key] = result
    return out


def _key(value: Any) -> Any:
    """Return the properties of an argument that a result's shape, strides and type can depend on."""
    kind = type(value)
    if kind is torch.Tensor:
        if not value.is_meta or value.is_neg() or value.is_conj():
            raise _NotComparable
        return value.shape, value.stride(), value.dtype
    if kind is list or kind is tuple:
        return tuple([_key(item) for item in value])
    if kind in _VALUES:
        return kind, value  # True == 1 == 1.0, but their results have other types
    raise _NotComparable


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, (list, tuple)):
        return set().union(*map(_storages, value))
    return set()


def _described(out: Any, forbidden: set[int]) -> Any:
    """Return a recipe for a result; `taken` are the storages that it must not share.

    Some operations return a view without a word in their schema, such as `_unsafe_view`.
    """
    if isinstance(out, torch.Tensor):
        storage = out.untyped_storage()
        alike = type(out) is torch.Tensor and out.is_meta and out.layout is torch.strided and not out.is_neg()
        if not alike or out.is_conj() or out.storage_offset() or storage._cdata in forbidden:
            raise _NotComparable
        recipe = (torch.Tensor, tuple(out.shape), out.stride(), out.dtype)
        if _made(recipe).untyped_storage().nbytes() != storage.nbytes():
            raise _NotComparable
        forbidden.add(storage._cdata)
        return recipe
    if type(out) in (list, tuple):
        return type(out), [_described(item, forbidden) for item in out]
    if type(out) in _VALUES:
        return None, out
    raise _NotComparable


def _made(recipe: Any) -> Any:
    kind = recipe[0]
    if kind is torch.Tensor:
        return torch.empty_strided(recipe[1], recipe[2], dtype=recipe[3], device=META)
    if kind is None:
        return recipe[1]
    return kind([_made(item) for item in recipe[1]])
