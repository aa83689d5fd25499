"""Heads of models that one process compares, such as a student and its teacher: those of one vocabulary share a device.

A trainer that compares two models by their heads (TRL 1.16's `DistillationTrainer`) refuses heads on two devices, and
logits that one script compares are computed without a copy where both heads are on one.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import devices
from ..language.message import Message
from ..upstream.model_ends import output_head
from .costed_model import CostedModel
from .places import device_of
from .plan import Plan

if TYPE_CHECKING:
    from torch import nn


def device_of_compared_head(model: "nn.Module", others: "Iterable[nn.Module]") -> int | None:
    """Return the index of the device that the head of another model with the vocabulary of `model` is on.

    Args:
        model: may be on the meta device.
        others: models that are loaded; the first one counts whose vocabulary has the same size.

    Returns:
        None where there is no such model, or its head is not on an accelerator.
    """
    size = _vocabulary(_head_weight(model))
    if size is None:
        return None
    weights = [_head_weight(other) for other in others if other is not model]
    places = [weight.device for weight in weights if _vocabulary(weight) == size]
    return next((place.index for place in places if place.type == devices.accelerator_type()), None)


def parted(plan: Plan, costed: CostedModel) -> bool:
    """Whether the map of `plan` has the head on another device than the one it is compared with."""
    heads = {device_of(name, plan.device_map) for name in costed.structure.named("head")}
    return costed.head_device is not None and bool(heads) and heads != {costed.head_device}


def noted(plan: Plan, costed: CostedModel) -> Plan:
    """Return `plan` with a note if its map parts the head from the one that it is compared with."""
    if not parted(plan, costed):
        return plan
    place = next((device.name for device in plan.devices if device.device.index == costed.head_device), None)
    reason = Message("a device that this one may not use")
    if place:
        reason = Message("{device}, and this one does not fit there", device=place)
    note = Message("the head of another model of the same vocabulary is on {where}", where=reason)
    return replace(plan, notes=(*plan.notes, note))


def _head_weight(model: "nn.Module") -> Any:
    """Return the weight that makes the logits over the vocabulary; None for a model without."""
    return getattr(output_head(model), "weight", None)


def _vocabulary(weight: Any) -> int | None:
    """Return the number of logits that `weight`, of shape (vocabulary, width), makes."""
    return int(weight.shape[0]) if getattr(weight, "ndim", 0) == 2 else None
