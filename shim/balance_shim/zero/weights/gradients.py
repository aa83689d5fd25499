"""Gradients as a script reads them, in a callback or between the backward pass and the next step.

DeepSpeed moves each gradient out of `parameter.grad` into a partitioned buffer, where it is from the backward pass
until the step. Under the Trainer both run within `accelerator.backward`, so that `on_pre_optimizer_step` would come
when the buffers are used up. It is called before DeepSpeed's step instead.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ... import zero_support
from .. import meeting


@dataclass
class _Gradients:
    """Those of one DeepSpeed optimizer.

    Attributes:
        are_complete: the step that follows updates the weights with them.
        are_used_up: it has done so.
        factor: by which the step multiplies them, once it is known.
    """

    are_complete: bool = False
    are_used_up: bool = False
    factor: Any = None


_gradients: "WeakKeyDictionary[Any, _Gradients]" = WeakKeyDictionary()
_callbacks: "WeakKeyDictionary[Any, Any]" = (
    WeakKeyDictionary()
)  # DeepSpeed's optimizer -> the function to call before its step


def arm(trainer: Any) -> None:
    """Have the callbacks of `trainer` run before the step of its engine. To be called when training begins."""
    engine, handler = trainer.model_wrapped, trainer.callback_handler
    before_step = getattr(type(handler), "on_pre_optimizer_step", None)
    if before_step is None:
        return

    def call() -> None:
        trainer.control = before_step(handler, trainer.args, trainer.state, trainer.control)

    _callbacks[engine.optimizer] = call
    vars(handler)["on_pre_optimizer_step"] = lambda args, state, control: control  # has been called
    zero_grad = type(engine).zero_grad

    def forget(*args: Any, **kwargs: Any) -> Any:
        _gradients.pop(engine.optimizer, None)
        return zero_grad(engine, *args, **kwargs)

    vars(engine)["zero_grad"] = forget


def after_backward(engine: Any) -> None:
    """The gradients of `engine` can be read."""
    _gradients[engine.optimizer] = _Gradients()


def before_step(engine: Any) -> None:
    """Call the function registered for before the step of `engine`, if it is going to update the weights."""
    gradients, call = _gradients.get(engine.optimizer), _callbacks.get(engine.optimizer)
    if gradients is None or not engine.is_gradient_accumulation_boundary():
        return
    gradients.are_complete = True
    if call is not None:
        call()


def after_step(engine: Any) -> None:
    """The gradients of `engine` have been used, if it has updated the weights."""
    gradients = _gradients.get(engine.optimizer)
    if gradients is not None:
        gradients.are_used_up = gradients.are_complete


def read(parameter: Any) -> Any:
    """Return the mean gradient of a `parameter` that an engine trains, as the step uses it. Ranks do this together.

    None where one process would have none either: before the backward pass, or after `zero_grad`.

    Raises:
        BalanceError: the step has used the gradient up, or not all ranks are here.
    """
    optimizer: Any = getattr(parameter, "_z3_optimizer", None)
    gradients = None if optimizer is None else _gradients.get(optimizer)
    if gradients is None or not parameter.requires_grad:
        return None
    if gradients.are_used_up:
        raise zero_support.refusal("gradient_used_up", shape=tuple(parameter.ds_shape))
    meeting.meet("reading a gradient")
    if gradients.factor is None:
        gradients.factor = _factor(optimizer)
    return (optimizer.get_fp32_grad_for_param(parameter) * gradients.factor).to(parameter.dtype)


def _factor(optimizer: Any) -> Any:
    """Return the step's factor of gradients: the inverse loss scale, and clipping (stage3.py, 0.16 to 0.19)."""
    import torch

    scale, limit = optimizer.loss_scale, optimizer.clip_grad
    if limit <= 0 or optimizer.offload_optimizer:  # reading norms of offloaded gradients uses them up
        return 1 / scale
    norm = torch.linalg.vector_norm(torch.stack(optimizer._get_norm_groups())) / scale
    return 1 / (scale * torch.clamp((norm + 1e-6) / limit, min=1.0))
