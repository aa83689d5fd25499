"""Modules that a script has put into a placed model, or in another order, since it was loaded.

A new head (`model.lm_head = nn.Linear(...)`) has none of accelerate's hooks and is on the host or at `model.device`, so
it meets hidden states of another device. Layers that were removed, copied or put in another order keep their hooks, but
the device map does not know them by their new names. Before a training the map is brought in line with the modules,
and new ones with the map.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import devices, log
from ..errors import LostModelError, MoveError
from ..map_file import DeviceMap
from ..memory.blocks import Block, chain, holder_of
from ..placement import align_hooks
from ..placement.places import device_of
from ..placement.plan import Plan
from ..units import counted
from ..upstream.trainer import TrainerLike
from . import outside

if TYPE_CHECKING:
    from torch import nn


def settle(trainer: TrainerLike, model: "nn.Module", plan: Plan) -> Plan:
    """Bring new modules to the devices of those they replace, and return the plan with the map of all modules.

    Args:
        trainer: a `transformers.Trainer` about to train.
        model: what was placed: the trainer's model, or one inside of it.
        plan: the one it was placed by.
    """
    several = len(set(plan.device_map.values())) > 1
    if (
        not several
        or not align_hooks.hooks_of(model)
        or not all(isinstance(at, int) for at in plan.device_map.values())
    ):
        return plan
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(parameter.device.type == "meta" for parameter in parameters.values()):
        return plan
    hooked = _hooked_parameters(model)
    blocks = chain(model)
    if any(holder_of(key, {block.name for block in blocks}) not in (None, key) for key in plan.device_map):
        return plan  # a map of the user's that places parts of blocks
    first = plan.devices[0].device.index
    actual: DeviceMap = {
        block.name: _place(block, parameters, hooked, device_of(block.name, plan.device_map), first) for block in blocks
    }
    new = [
        block.name
        for block in blocks
        if block.kind != "tensor" and block.parameters and not hooked & {*block.parameters}
    ]
    astray = [
        name
        for block in blocks
        for name in block.parameters
        if name not in hooked and parameters[name].device.index != actual[block.name]
    ]
    renamed = any(device_of(name, plan.device_map) not in (None, at) for name, at in actual.items())
    unnamed = any(device_of(name, plan.device_map) is None for name in actual)
    if not (new or astray or renamed or unnamed):
        return plan
    try:
        outside.move_along(trainer, model, actual)
    except LostModelError:
        raise
    except MoveError as error:
        log.debug(f"modules that the script has put into {type(model).__name__} stay where they are: {error}")
        return plan
    if astray:
        log.info(
            f"{counted(len(astray), 'parameter')} put into {type(model).__name__} after loading ({astray[0]}, for one) "
            "moved to the device that the map has for the module"
        )
    return replace(plan, device_map=actual)


def _hooked_parameters(model: "nn.Module") -> frozenset[str]:
    """Return the names of the parameters that are directly in modules with a hook of accelerate's."""
    return frozenset(
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules(remove_duplicate=False)
        if prefix and align_hooks.hooks_of(module)
        for key in module._parameters
    )


def _place(
    block: Block, parameters: "dict[str, Any]", hooked: frozenset[str], planned: int | str | None, first: int
) -> int:
    """Return the device of a block: where its modules with hooks are, else that of the map, else where it is."""
    kind = devices.accelerator_type()
    inside = [parameters[name].device for name in block.parameters if name in hooked]
    if not inside and isinstance(planned, int):
        return planned
    inside = inside or [parameters[name].device for name in block.parameters]
    places = Counter(place.index for place in inside if place.type == kind and place.index is not None)
    if not places:
        return planned if isinstance(planned, int) else first
    return int(places.most_common(1)[0][0])
