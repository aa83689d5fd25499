"""A tensor without values that stands for logits: it becomes them when somebody needs more than a chunk at a time."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map

from .. import log, state
from .recipe import Recipe

Handler = Callable[[Callable[..., Any], Recipe, tuple[Any, ...], dict[str, Any]], Any]

# Of these only the shell is asked. Everything that needs values is an operation.
_SHELL = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "grad", "layout", "is_cuda",
        "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "output_nr", "_version",
    )
} | {
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex",
        "get_device", "is_contiguous", "stride", "storage_offset", "__len__",
    )
}  # fmt: skip


class DeferredLogits(torch.Tensor):
    """Made by `defer`. Attributes: `recipe`, and `full`, the values once they have been needed all at once."""

    recipe: Recipe
    full: torch.Tensor | None
    handlers: ClassVar[dict[Any, Handler]] = {}  # operation -> how it is done in chunks; filled by `operations`

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SHELL:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        handler = cls.handlers.get(func)
        if handler is not None and args and isinstance(args[0], cls) and args[0].full is None:
            found = _by_chunks(handler, func, args[0].recipe, args[1:], kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(lambda each: _in_full(each, func), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        # What calls operations from C++, or inside of an autograd function, where gradients go through `_Shell`.
        args, kwargs = tree_map(lambda each: _in_full(each, func, detached=True), (args, kwargs or {}))
        return func(*args, **kwargs)


def defer(recipe: Recipe) -> torch.Tensor:
    """Return logits that are computed when they are needed."""
    if recipe.differentiable and torch.is_grad_enabled():
        made: torch.Tensor = _Shell.apply(recipe, recipe.rows, *recipe.parameters)
        return made
    return _shell(recipe)


def _shell(recipe: Recipe) -> torch.Tensor:
    sample = recipe.sample
    made: Any = torch.Tensor._make_wrapper_subclass(
        DeferredLogits, recipe.shape, dtype=sample.dtype, device=sample.device, requires_grad=False
    )
    made.recipe, made.full = recipe, None
    return made


class _Shell(torch.autograd.Function):
    """Ties the shell to what it is made of, for gradients that arrive at it by ways that its class does not see.

    Other people's autograd functions (fused losses) take their arguments as they are.
    """

    @staticmethod
    def forward(ctx, recipe, rows, *parameters):
        ctx.recipe = recipe
        return _shell(recipe)

    @staticmethod
    def backward(ctx, gradient):
        recipe, needed = ctx.recipe, ctx.needs_input_grad[1:]
        with torch.enable_grad():
            rows = recipe.rows.detach().requires_grad_(needed[0])
            wanted = [each for each, need in zip((rows, *recipe.parameters), needed, strict=True) if need]
            found = iter(torch.autograd.grad(recipe.values(rows), wanted, gradient, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def _by_chunks(handler: Handler, func: Any, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return handler(func, recipe, args, kwargs)
    except torch.OutOfMemoryError:  # in full it would take more
        raise
    except Exception as failure:
        if state.settings().strict:
            raise
        # Mistakes of the caller's come up again where the original is called.
        log.debug(f"{_name(func)} in chunks failed ({type(failure).__name__}: {failure})")
        return NotImplemented


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _in_full(value: Any, func: Any, detached: bool = False) -> Any:
    if not isinstance(value, DeferredLogits):
        return value
    if value.full is None:
        recipe = value.recipe
        if recipe.rows.numel() // recipe.rows.shape[-1] > recipe.chunk:
            log.once("info", f"the logits are read in full (by {_name(func)!r}), so their memory is needed after all")
        value.full = recipe.in_full()
    return value.full.detach() if detached else value.full
