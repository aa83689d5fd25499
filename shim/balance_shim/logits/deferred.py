"""A tensor without values that stands for logits: it becomes them when somebody needs more than a chunk at a time."""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from .. import log, state
from .recipe import Recipe

Handler = Callable[[Callable[..., Any], Recipe, tuple[Any, ...], dict[str, Any]], Any]

# How checkpointing ends a recomputation early, where a script has a loss in chunks inside of one.
_NO_FAILURE = (checkpoint._StopRecomputationError,) if hasattr(checkpoint, "_StopRecomputationError") else ()

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
    """Made by `defer`.

    Attributes:
        recipe: how to compute the values.
        full: the values, once they have been needed all at once.
        base: the logits that these would share memory with; `recipe.view` makes these from them.
    """

    recipe: Recipe
    full: torch.Tensor | None
    base: "DeferredLogits | None"
    handlers: ClassVar[
        dict[Any, Handler]
    ] = {}  # operation -> how it is done in chunks; filled by `operations.register`

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if args and isinstance(args[0], cls) and args[0].full is None:
            if func in _SHELL:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if _writes(func):
                args[0].recipe.step.settle()
            elif func in cls.handlers:
                result = _by_chunks(cls.handlers[func], func, args[0].recipe, args[1:], kwargs)
                if result is not NotImplemented:
                    return _views(result, args[0], func)
        args, kwargs = tree_map(lambda value: _in_full(value, func), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # For operations called from C++, or inside of an autograd function, where gradients go through `_Shell`.
        args, kwargs = tree_map(lambda value: _in_full(value, func, detached=True), (args, kwargs or {}))
        return func(*args, **kwargs)


def defer(recipe: Recipe) -> torch.Tensor:
    """Return logits that are computed when they are needed."""
    if recipe.differentiable and torch.is_grad_enabled():
        logits: torch.Tensor = _Shell.apply(recipe, recipe.rows, *recipe.parameters)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return logits
    return _shell(recipe)


def _shell(recipe: Recipe) -> DeferredLogits:
    sample = recipe.sample
    logits: DeferredLogits = torch.Tensor._make_wrapper_subclass(
        DeferredLogits, recipe.shape, dtype=sample.dtype, device=sample.device, requires_grad=False
    )
    logits.recipe, logits.full, logits.base = recipe, None, None
    recipe.step.shells.append(weakref.ref(logits))
    return logits


class Step:
    """The deferred logits of one training step that somebody still has, in the order in which they were made."""

    def __init__(self) -> None:
        self.shells: list[weakref.ref[DeferredLogits]] = []

    def settle(self) -> None:
        """Make the values, sharing memory as they would: what is about to be written into one shows in the others."""
        for shell in self._alive():
            if shell.base is not None and shell.recipe.view is not None:
                full, shell.base = shell.base.full, None
                shell.full = shell.recipe.undisturbed(shell.recipe.view, full)
            elif shell.full is None:
                shell.full = shell.recipe.in_full()

    def end(self) -> None:
        """Make the values that are kept beyond the step: the optimizer is about to change the head."""
        for reference in reversed(self.shells):  # a view first: only it may have kept what it is a view of
            shell = reference()
            if shell is not None:
                _in_full(shell, "keeping them")
                shell.base = None
                del shell.recipe  # and with it the hidden states
        self.shells.clear()

    def _alive(self) -> list[DeferredLogits]:
        return [shell for shell in (reference() for reference in self.shells) if shell is not None]


def _writes(func: Any) -> bool:
    """Whether `func` changes values in place: `mul_`, `__setitem__`, `__imul__`."""
    name = _name(func)
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__setitem__", *(f"__i{operation}__" for operation in _ARITHMETIC)}


def _views(result: Any, of: DeferredLogits, func: Any) -> Any:
    """Return a handler's result, with its deferred logits linked to those whose memory they would share."""
    for output in result if isinstance(result, tuple) else (result,):
        if isinstance(output, DeferredLogits) and output.recipe.view is not None:
            output.base = of
    return iter(result) if func is torch.Tensor.__iter__ else result


class _Shell(torch.autograd.Function):
    """Ties the shell to the tensors it is made from, for gradients that arrive in ways that its class does not see.

    Other people's autograd functions (fused losses) take their arguments as they are.
    """

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, rows: torch.Tensor, *parameters: torch.Tensor) -> DeferredLogits:
        ctx.recipe = recipe
        return _shell(recipe)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recipe, needed = ctx.recipe, ctx.needs_input_grad[1:]
        with torch.enable_grad():
            rows = recipe.rows.detach().requires_grad_(needed[0])
            inputs = [tensor for tensor, need in zip((rows, *recipe.parameters), needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(recipe.values(rows), inputs, gradient, allow_unused=True))
        return None, *(next(gradients) if need else None for need in needed)


def _by_chunks(handler: Handler, func: Any, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return handler(func, recipe, args, kwargs)
    except (torch.OutOfMemoryError, *_NO_FAILURE):  # in full it would take more
        raise
    except Exception as failure:
        if state.settings().strict:
            raise
        # Mistakes of the caller's come up again where the original is called.
        log.debug(f"{_name(func)} in chunks failed ({type(failure).__name__}: {failure})")
        return NotImplemented


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _in_full(value: Any, func: Any, detached: bool = False) -> Any:
    if not isinstance(value, DeferredLogits):
        return value
    if value.full is None:
        recipe = value.recipe
        if recipe.rows.numel() // recipe.rows.shape[-1] > recipe.chunk:
            log.once("info", f"{_name(func)!r} reads the full logits, which takes their memory after all")
        value.full = recipe.in_full()
    return value.full.detach() if detached else value.full
