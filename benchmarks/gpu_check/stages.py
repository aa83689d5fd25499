"""Stage at a time: each device's share of a map alone on one card, so that one card checks a map of many devices.

The blocks of one device are on the card; all others are on a device of the trace, whose tensors have a shape and take
no memory. A tensor that crosses to the card arrives there as zeros of its shape (token ids keep their values), and its
gradient crosses back in the same way. So the model's own code runs whole training steps, and the card holds at any
moment what that device of the map would hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from balance_shim.logits.head import deferring, head_of
from balance_shim.logits.operations import DeferredLogits
from balance_shim.memory.tracing.machine import TracedTensor, traced, tracing
from balance_shim.memory.tracing.model_copy import traced_copy
from balance_shim.memory.tracing.run import wrap_forward
from balance_shim.memory.workload import Workload
from balance_shim.virtual.machine import Machine

from .card import Card, Peaks

STEPS = 3  # the optimizer has its state after the first, and the allocator has settled after the second


class _Cross(torch.autograd.Function):
    """A tensor arrives on the card, or leaves it; so does its gradient, the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device, machine: Machine) -> torch.Tensor:
        ctx.source, ctx.machine = tensor.device, machine
        return _arrived(tensor, device, machine)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _arrived(grad, ctx.source, ctx.machine), None, None


def _arrived(tensor: torch.Tensor, device: torch.device, machine: Machine) -> torch.Tensor:
    if device == machine.devices[0]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return traced(host if tensor.is_floating_point() else tensor.detach().cpu(), 0, machine)
    raw = tensor.raw if isinstance(tensor, TracedTensor) else tensor
    if raw.is_meta:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return raw.to(device)


class _Border:
    """Between the card and the device of the trace."""

    def __init__(self, card: Card, machine: Machine) -> None:
        self.card, self.elsewhere, self._machine = card.device, machine.devices[0], machine

    def crossed(self, value: Any, device: torch.device) -> Any:
        """Return `value` with all its tensors on `device`."""

        def cross(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or isinstance(leaf, DeferredLogits) or leaf.device == device:
                return leaf
            return _Cross.apply(leaf, device, self._machine)

        return tree_map(cross, value)


def measure_stage(
    card: Card, model: nn.Module, device_map: Mapping[str, int], stage: int, first: int, workload: Workload
) -> Peaks:
    """Return the peaks of the card as device `stage` of `device_map`, over some training steps with AdamW.

    Args:
        model: on the meta device, in its final dtype; what trains in it has `requires_grad`.
        device_map: block name -> device index.
        first: the index of the device where inputs arrive and outputs return.
    """
    with tracing(1, with_real=True) as machine:
        border = _Border(card, machine)
        twin = traced_copy(model, machine, lambda _: 0)
        places = {name: border.card if index == stage else border.elsewhere for name, index in device_map.items()}
        for name, place in places.items():
            if place == border.card:
                _materialize(twin, name, place)
        _place_inputs(twin, places, border)
        with card.measured() as peaks:
            _train(twin, border, border.card if stage == first else border.elsewhere, workload)
    return peaks[0]


def _train(model: nn.Module, border: _Border, home: torch.device, workload: Workload) -> None:
    model.train()
    model.config.use_cache = False
    if workload.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    parameters = [
        parameter for parameter in model.parameters() if parameter.requires_grad and parameter.device == border.card
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None
    ids = torch.ones(workload.batch_size, workload.seq_len, dtype=torch.int64)
    head = next((parameter.device for parameter in head_of(model).parameters()), home)
    for _ in range(STEPS):
        batch = border.crossed({"input_ids": ids}, home) | border.crossed({"labels": ids}, head)
        with _loss_context(model, workload):
            outputs = border.crossed(dict(model(**batch)), home)  # as accelerate returns them
            loss = outputs.pop("loss")
            del outputs
            loss.backward()
        del loss, batch
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _loss_context(model: nn.Module, workload: Workload) -> Iterator[None]:
    if workload.loss != "chunked":
        yield
        return
    with deferring(model) as step:
        yield
    if step is not None:
        step.end()


def _materialize(model: nn.Module, name: str, device: torch.device) -> None:
    """Give the tensors of the block `name`, a module or a single tensor, memory on `device`, with small values."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key != name and not key.startswith(f"{name}."):
            continue
        owner, _, label = key.rpartition(".")
        fresh = torch.full(tensor.shape, 0.01 if tensor.is_floating_point() else 0, dtype=tensor.dtype, device=device)
        module = model.get_submodule(owner)
        if label in module._buffers:
            module._buffers[label] = fresh
        else:
            module._parameters[label] = nn.Parameter(fresh, tensor.requires_grad)


def _place_inputs(model: nn.Module, places: Mapping[str, torch.device], border: _Border) -> None:
    """Bring to each block its inputs, as accelerate does at every module of a device map."""
    modules = dict(model.named_modules())
    for name, place in places.items():

        def arrive(args: Any, kwargs: Any, place: torch.device = place) -> Any:
            return border.crossed(args, place), border.crossed(kwargs, place)

        if name in modules:  # not so a single tensor
            wrap_forward(modules[name], arrive)
