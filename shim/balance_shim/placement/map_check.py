"""A user's device map against the real model, before any weight is read."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .. import log
from ..errors import DeviceMapError
from ..map_file import OFFLOADED, DeviceMap, UserMap
from ..memory.blocks import Block, within
from ..memory.structure import ModelStructure
from .places import device_of

if TYPE_CHECKING:
    from torch import nn

# A forgotten module is placed with its neighbour if it is no larger than this, or than a thousandth of the model:
# norms and rotary embeddings are, projectors and heads of real models are not.
SMALL_BYTES = 1 << 20
MOST_NAMED = 12  # in one line: all that is wrong with a map of this model, and not all of one for another model


def fit(
    user_map: UserMap, model: "nn.Module", structure: ModelStructure, devices: int
) -> tuple[DeviceMap, tuple[str, ...]]:
    """Return the map completed for `model`, and a note on each name that was added.

    Args:
        user_map: as `map_file.read` gives it.
        model: the model it is for; may be on the meta device.
        structure: that of `model`.
        devices: how many accelerators there are.

    Raises:
        DeviceMapError: names that the model does not have, devices that do not exist, parameters or buffers that no
            key covers, a layer or tied weights on two devices.
    """
    device_map, source = user_map
    _check_devices(device_map, source, devices)
    _check_names(device_map, source, model)
    completed, notes = _complete(device_map, source, model, structure)
    _check_layers(completed, source, structure)
    _check_ties(completed, source, structure)
    completed = _by_modules(completed, source, model)
    offloaded = sorted(name for name, device in completed.items() if device in OFFLOADED)
    if offloaded:
        placement = f"{_listed(offloaded)}: kept on {completed[offloaded[0]]}, as in the map"
        log.warning(f"{source}: {placement}; weights that are not on an accelerator do not train")
    return completed, tuple(f"{source}: {note}" for note in notes)


def _check_devices(device_map: DeviceMap, source: str, devices: int) -> None:
    for name, device in device_map.items():
        if isinstance(device, int) and device >= devices:
            available = (
                f"there are {devices} devices (0 to {devices - 1})" if devices else "there is no accelerator here"
            )
            raise DeviceMapError(f"{source}: {name!r} is mapped to device {device}, but {available}")


def _check_names(device_map: DeviceMap, source: str, model: "nn.Module") -> None:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    tensors = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    existing = {*modules, *tensors}
    unknown = [name for name in device_map if name not in existing]
    if unknown:
        shown = [f"{name!r}{_suggestion(name, modules, tensors)}" for name in unknown[:3]]
        shown += [f"{name!r}" for name in unknown[3:MOST_NAMED]]
        count = "a name" if len(unknown) == 1 else f"{len(unknown)} names"
        raise DeviceMapError(f"{source}: {count} not in {type(model).__name__}: {', '.join(shown)}{_more(unknown)}")


def _suggestion(name: str, modules: list[str], tensors: list[str]) -> str:
    """Return " (did you mean ...?)", preferring names that differ by a prefix: that is how versions rename models."""
    tails = [real for real in modules if real.endswith(f".{name}") or (real and name.endswith(f".{real}"))]
    deep = [real for real in modules if name.rpartition(".")[2] == real.rpartition(".")[2]] or modules
    near = sorted(tails, key=len)[-1:] or get_close_matches(name, deep, 1, 0.5) or get_close_matches(name, tensors, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _complete(
    device_map: DeviceMap, source: str, model: "nn.Module", structure: ModelStructure
) -> tuple[DeviceMap, list[str]]:
    """Return the map with missing names added where that is safe, and a note on each addition."""
    completed, notes, lost = dict(device_map), [], []
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in _tensors(model)}
    limit = max(SMALL_BYTES, sum(sizes.values()) // 1000)
    blocks = structure.blocks
    for position, block in enumerate(blocks):
        missing = [name for name in block.tensors if device_of(name, device_map) is None]
        if not missing:
            continue
        all_missing = len(missing) == len(block.tensors)
        if all_missing:
            near, why = _tied_place(block, structure.ties, device_map), "which it is tied to"
            small = block.role in ("other", "tower") and sum(sizes[name] for name in block.tensors) <= limit
            if near is None and (small or not block.parameters):
                near, why = _neighbour(position, blocks, device_map), "its neighbour"
        else:
            covered = {name: device_of(name, device_map) for name in block.tensors}
            places = {device for device in covered.values() if device is not None}
            near, why = (next(name for name in covered if covered[name] is not None), "the rest of its block")
            near = near if len(places) == 1 else None
        if near is None:
            lost.append(block.name if all_missing else missing[0])
            continue
        device = device_of(near, device_map)
        assert device is not None, "neighbours are chosen among what the map covers"
        for name in [block.name] if all_missing else missing:
            completed[name] = device
            notes.append(f"{name} is missing from the map and is placed on {device}, to {why}")
    if lost:
        of = f"of {type(model).__name__}; add {'them' if len(lost) > 1 else 'it'} to the map"
        raise DeviceMapError(f"{source}: no device for {_listed(lost)} {of}")
    return completed, notes


def _tied_place(block: Block, ties: Iterable[frozenset[str]], device_map: DeviceMap) -> str | None:
    """Return a covered name that one of the block's parameters is tied to."""
    for group in ties:
        if not group.isdisjoint(block.parameters):
            return next((name for name in sorted(group) if device_of(name, device_map) is not None), None)
    return None


def _neighbour(position: int, blocks: tuple[Block, ...], device_map: DeviceMap) -> str | None:
    """Return the covered block nearest in the chain: before a module with parameters, first for one without."""
    block = blocks[position]
    covered = [other for other in blocks if all(device_of(name, device_map) is not None for name in other.tensors)]
    if not block.parameters:
        parent = block.name.rpartition(".")[0]
        family = [other for other in covered if within(other.name, parent)]
        return (family or covered)[0].tensors[0] if covered else None
    before = [other for other in blocks[:position] if other in covered and other.parameters]
    after = [other for other in blocks[position:] if other in covered]
    nearest = before[-1:] or after[:1]
    return nearest[0].tensors[0] if nearest else None


def _check_layers(device_map: DeviceMap, source: str, structure: ModelStructure) -> None:
    for block in structure.blocks:
        places = {device_of(name, device_map): name for name in reversed(block.tensors)}
        one_module = block.name in structure.layers or all(_parent(name) == block.name for name in block.tensors)
        if len(places) > 1 and one_module:
            parts = ", ".join(f"{name} on {device}" for device, name in places.items())
            raise DeviceMapError(
                f"{source}: {block.name} ({block.kind}) must stay on one device, but the map splits it: {parts}; "
                f'give "{block.name}" one device'
            )


def _check_ties(device_map: DeviceMap, source: str, structure: ModelStructure) -> None:
    for group in structure.ties:
        places = {device_of(name, device_map): name for name in sorted(group)}
        if len(places) > 1:
            parts = " and ".join(f"{name} on {device}" for device, name in places.items())
            raise DeviceMapError(f"{source}: tied weights are one tensor and need one device, but the map has {parts}")


def _by_modules(device_map: DeviceMap, source: str, model: "nn.Module") -> DeviceMap:
    """Return the map with modules in the place of tensors that it names.

    accelerate brings inputs to the modules that a map names, so that nothing would be brought to a named tensor.

    Raises:
        DeviceMapError: the tensors of one module are on two devices.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = [name for name in device_map if name not in modules]
    by_modules = {name: place for name, place in device_map.items() if name in modules}
    for owner in dict.fromkeys(map(_parent, named)):
        inside = f"{owner}." if owner else ""
        module = modules[owner]
        own = [f"{inside}{key}" for key in (*module._parameters, *module._buffers)]
        own = [name for name in own if device_of(name, device_map) is not None]
        places = {device_of(name, device_map): name for name in reversed(own)}
        if any(True for _ in module.children()):  # its children have entries of their own
            by_modules |= {name: device_map[name] for name in named if _parent(name) == owner}
        elif len(places) > 1:
            parts = " and ".join(f"{name} on {place}" for place, name in places.items())
            raise DeviceMapError(
                f"{source}: {owner} computes with all of its tensors at once, but the map has {parts}; "
                f'give "{owner}" one device'
            )
        else:
            by_modules[owner] = device_map[next(name for name in named if _parent(name) == owner)]
    return by_modules


def _tensors(model: "nn.Module") -> Iterable[tuple[str, "nn.Parameter"]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)  # type: ignore[misc]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + _more(names)


def _more(names: list[str]) -> str:
    return f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
