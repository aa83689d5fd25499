"""Blocks that no dry run has reached: where they go, how a device map names them, and the line on them in a plan."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from ..device import Device
from ..language.message import Joined, Message
from ..map_file import DeviceMap
from ..memory.blocks import Block, within
from ..memory.colocation import of_unreached
from .balance import DoesNotFit, balance
from .costed_model import CostedModel
from .plan import Plan, evaluate


def carefully(costed: CostedModel, devices: Sequence[Device]) -> CostedModel:
    """Return `costed` with constraints for blocks that no dry run has reached: the strictest that fit.

    Where it fits with none of them, those that can at least be loaded.

    Raises:
        DoesNotFit: the weights alone do not fit.
    """
    constraints = of_unreached(costed.structure, costed.unreached)
    levels = [replace(costed, constraints=costed.constraints.and_those(constraint)) for constraint in constraints]
    if len(levels) == 1:
        return levels[0]
    loads = []
    for level in levels:
        with contextlib.suppress(DoesNotFit):
            if not evaluate("balanced", level, balance(level, devices), devices).shortfall:
                return level
            loads.append(level)
    return loads[0] if loads else levels[-1]


def whole(costed: CostedModel, device_map: DeviceMap) -> DeviceMap:
    """Return `device_map` with unreached blocks named by the outermost module around them that is on one device.

    The inputs of a module that a map names are brought to its device. Those of a module whose parts are named are not,
    so that operations between its parts may meet tensors of two devices.
    """
    named: dict[str, str] = {}
    for block in costed.blocks:
        if block.name in costed.unreached and block.name:
            outer = _outermost_whole(block, costed.blocks, device_map)
            named |= {inner.name: outer for inner in costed.blocks if within(inner.name, outer)}
    return {named.get(name, name): place for name, place in device_map.items()}


def line(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> str:
    """Return a plan's note on blocks that no dry run has reached; "" where there are none."""
    unreached = [block for block in costed.blocks if block.name in costed.unreached and block.role != "layer"]
    if not unreached:
        return ""
    names = [_outermost_whole(block, costed.blocks, device_map) for block in unreached]
    listed = list(dict.fromkeys(names))
    shown: str = Joined(", ", listed[:4])
    if len(listed) > 4:
        shown = Message("{names} and {number} more", names=shown, number=len(listed) - 4)
    places = {device_map[block.name] for block in unreached}
    first = devices[0]
    if places == {first.index}:
        return Message(
            "not reached by the dry run, so kept together on {device}: {names}", device=first.name, names=shown
        )
    return Message(
        "not reached by the dry run, and too large to be kept together on {device}: {names}",
        device=first.name,
        names=shown,
    )


def noted(plan: Plan, costed: CostedModel, devices: Sequence[Device]) -> Plan:
    """Return `plan`, whose map names blocks, with `line` among its notes and modules named as a `whole`."""
    text = line(costed, plan.device_map, devices)
    notes = (*plan.notes, text) if text else plan.notes
    return replace(plan, notes=notes, device_map=whole(costed, plan.device_map))


def _outermost_whole(block: Block, blocks: Sequence[Block], device_map: DeviceMap) -> str:
    """Return the name of the outermost module around `block`, but for the model, whose blocks are all on one device."""
    path = block.name.split(".")
    for depth in range(1, len(path)):
        outer = ".".join(path[:depth])
        if len({device_map[inner.name] for inner in blocks if within(inner.name, outer)}) == 1:
            return outer
    return block.name
