"""Selective activation checkpointing: the fewest layers that have to be recomputed for everything to fit."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..device import Device
from ..timing.work import ModelWork
from .balance import balance
from .costed_model import CostedModel
from .plan import Plan, evaluate


def least_recomputation(
    plain: CostedModel, recomputed: CostedModel, devices: Sequence[Device]
) -> tuple[CostedModel, frozenset[str]]:
    """Return the costs with as few layers recomputed as it takes to fit, and the names of these layers.

    With everything recomputed that can be, where not even that fits.

    Args:
        plain: the model's costs with no layer recomputed.
        recomputed: the same with all of them.
        devices: the devices that it has to fit on.

    Raises:
        DoesNotFit: the weights alone do not fit.
    """
    layers = recomputable(plain, recomputed)
    mixed = mixer(plain, recomputed)

    def plan_with(number: int) -> Plan:
        costed = mixed(_spread(layers, number))
        return evaluate("balanced", costed, balance(costed, devices), devices)

    if not plan_with(0).shortfall:
        return plain, frozenset()
    low, high = 0, len(layers)
    if plan_with(high).shortfall:
        return recomputed, frozenset(layers)
    while high - low > 1:
        middle = (low + high) // 2
        if plan_with(middle).shortfall:
            low = middle
        else:
            high = middle
    plan = plan_with(high)
    chosen = _spared(plan, mixed, _spread(layers, high), devices)
    return mixed(chosen), chosen


def recomputable(plain: CostedModel, recomputed: CostedModel) -> list[str]:
    """Return the names of the layers that keep less when they are recomputed."""
    return [
        block.name
        for block, before, after in zip(plain.blocks, plain.costs, recomputed.costs, strict=True)
        if block.role in ("layer", "tower") and after.activations < before.activations
    ]


def mixer(plain: CostedModel, recomputed: CostedModel) -> Callable[[frozenset[str]], CostedModel]:
    """Return a function from the names of recomputed layers to the costs of the model."""

    def mixed(chosen: frozenset[str]) -> CostedModel:
        costs = (
            after if block.name in chosen else before
            for block, before, after in zip(plain.blocks, plain.costs, recomputed.costs, strict=True)
        )
        records = (
            after if block.name in chosen else before
            for block, before, after in zip(plain.blocks, plain.records, recomputed.records, strict=False)
        )
        work = tuple(
            after if block.name in chosen else before
            for block, before, after in zip(plain.blocks, plain.work.blocks, recomputed.work.blocks, strict=False)
        )
        like = recomputed if chosen else plain
        return replace(
            plain,
            costs=tuple(costs),
            workload=like.workload,
            first=like.first,
            records=tuple(records),
            first_record=like.first_record,
            work=ModelWork(work, like.work.first),
        )

    return mixed


def _spread(layers: Sequence[str], number: int) -> frozenset[str]:
    """Return `number` of `layers`, as evenly spread as can be, so that each device gets its part of them."""
    count = len(layers)
    return frozenset(layers[position * count // number] for position in range(number))


def _spared(
    plan: Plan,
    mixed: Callable[[frozenset[str]], CostedModel],
    chosen: frozenset[str],
    devices: Sequence[Device],
) -> frozenset[str]:
    """Return `chosen` without the layers that, on their device of this plan, need not be recomputed after all."""
    for name in sorted(chosen):
        fewer = chosen - {name}
        if not evaluate("balanced", mixed(fewer), plan.device_map, devices).shortfall:
            chosen = fewer
    return chosen
