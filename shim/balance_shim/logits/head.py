"""The head of a model, and the context in which it hands out deferred logits."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import log
from ..patching.guard import attempt
from ..upstream.model_ends import output_head
from . import chunks, operations
from .deferred import DeferredLogits, Step, defer
from .recipe import Recipe

operations.register()

FULL = "the loss is computed from full logits: "
WRAPPERS = 8  # of PEFT, DDP and others around a model


def head_of(model: "nn.Module") -> nn.Module | None:
    """Return the module that makes the logits: that of `model`, or of the language model inside of it."""
    return next((head for head in map(output_head, model.modules()) if head is not None), None)


def reason_for_full(head: nn.Module) -> str:
    """Return why `head` cannot run in chunks; "" if it can."""
    for parameter in head.parameters():
        if hasattr(parameter, "ds_id") or type(parameter).__name__ in ("DTensor", "FlatParameter"):
            return "the head's weight is sharded over processes"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules()):
        return "the head has dropout, whose mask would differ in chunks"
    if not _is_linear(head):
        return f"a head of class {type(head).__name__} may mix tokens"
    hook = getattr(head, "_hf_hook", None)
    if any(getattr(attached, "offload", False) for attached in (hook, *getattr(hook, "hooks", ()))):
        return "the head's weight is offloaded"
    return ""


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, plain or quantized by whatever library, adapted by PEFT or not."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    if isinstance(inner, nn.Module) and type(module).__module__.startswith("peft."):
        return _is_linear(inner)
    if type(module).forward is nn.Linear.forward:
        return True
    from ..upstream.quantized import is_quantized_linear

    # Classes of quantizers compute the same in another way; one of the script's own may do anything, draw noise too.
    return is_quantized_linear(module) or (isinstance(module, nn.Linear) and module.weight.element_size() == 1)


def deferring(model: "nn.Module") -> contextlib.AbstractContextManager[Step | None]:
    """Return a context in which the head of `model` hands out deferred logits where gradients are wanted.

    The context gives the step that they belong to, which whoever trains has to `end`; None where nothing is deferred.
    """
    head = head_of(model)
    if head is None:
        return contextlib.nullcontext()
    reason = reason_for_full(head)
    if not reason and _is_compiled(model, head):
        reason = "the model is compiled, and chunks would recompile it in each step"
    if reason:
        log.once("info", FULL + reason)
        return contextlib.nullcontext()
    return _deferring(head)


def _is_compiled(model: "nn.Module", head: nn.Module) -> bool:
    """Whether the script has compiled the head, or a module around it: the first few, looked at in each step."""
    return any(
        (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None)
        and any(inner_module is head for inner_module in module.modules())
        for module in (head, *itertools.islice(model.modules(), WRAPPERS))
    )


@contextlib.contextmanager
def _deferring(head: nn.Module) -> Iterator[Step]:
    own, step = vars(head), Step()
    was_there, before = "forward" in own, own.get("forward")
    own["forward"] = _Forward(head, head.forward, step)  # where accelerate's hooks have theirs, which is then inside
    try:
        yield step
    finally:
        if was_there:
            own["forward"] = before
        else:
            own.pop("forward", None)


class _Forward:
    """The `forward` of a head during a training step. Copies of the head, which outlive the step, have the old one."""

    def __init__(self, head: nn.Module, inner: Callable[..., Any], step: Step) -> None:
        self._head, self._inner, self._step = head, inner, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits = attempt(
            "deferring the logits", _deferred, self._head, self._inner, self._step, args, kwargs,
            instead="full logits are computed",
        )  # fmt: skip
        return self._inner(*args, **kwargs) if logits is None else logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._inner, memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self._inner,)


def _deferred(
    head: nn.Module, inner: Callable[..., Any], step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Return deferred logits; None where they are wanted now, or are too few to bother."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or isinstance(args[0], DeferredLogits):
        return None
    hidden = args[0]
    if not head.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    parameters = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    if hidden.dim() < 2 or not hidden.numel() or not (hidden.requires_grad or parameters):
        return None
    kind = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(rows: torch.Tensor) -> torch.Tensor:
        # As autocast was when the head was called. Without its cache: what it keeps in a chunk, or where no gradients
        # are wanted, would be found again where they are.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            logits: torch.Tensor = inner(rows)
        return logits

    rows = hidden.numel() // hidden.shape[-1]
    with torch.no_grad():
        sample = run(hidden.reshape(-1, hidden.shape[-1])[:1])
    if not isinstance(sample, torch.Tensor) or sample.dim() != 2 or not sample.is_floating_point():
        return None
    chunk = chunks.rows_in_chunk(rows, sample.shape[-1], bool(parameters))
    if chunk >= rows:
        return None
    if hidden.device != sample.device:
        hidden = hidden.to(sample.device)
    return defer(Recipe(hidden, run, sample, parameters, chunk, step))
