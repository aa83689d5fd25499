"""Models that do not run as a whole on what can be supposed: the language model and each tower traced on its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..blocks import Block, within
from ..colocation import NO_CONSTRAINTS
from ..recomputation import is_supported
from ..workload import Workload
from . import measure
from .errors import CannotTrace
from .inputs import supposed_batches, supposed_pictures
from .model_copy import Trains
from .result import Held, Traced


def trace_parts(
    model: nn.Module,
    blocks: Sequence[Block],
    workload: Workload,
    trains: Trains,
    loss_on_first: bool,
    whole: CannotTrace,
) -> Traced:
    """Return what the parts of `model` hold. Blocks between them (projectors) are left to the formula.

    Raises:
        CannotTrace: `whole`, if there is no language model inside that could be traced on its own.
    """
    if not is_supported(model):  # what is inside may support it, and is not asked
        workload = replace(workload, gradient_checkpointing=False)
    text = _common([block.name for block in blocks if block.role in ("embedding", "layer", "head")])
    text = text or _common([block.name for block in blocks if block.role in ("embedding", "layer")])
    if not text:
        raise whole
    try:
        found = [_part(model, text, blocks, workload, trains, loss_on_first)]
    except CannotTrace:
        raise whole from None  # of the class that is trained, not of one inside of it
    for tower in _towers(blocks):
        try:
            found.append(_part(model, tower, blocks, workload, trains))
        except CannotTrace:
            continue  # the formula has a figure for it
    held: dict[str, Held] = {}
    trained: dict[str, list[torch.Tensor]] = {}
    speaks_for = {block.name: block.name for block in blocks}
    constraints = NO_CONSTRAINTS
    for part in found:
        held |= part.held
        trained |= part.trained
        speaks_for |= part.speaks_for
        constraints = constraints.and_those(part.constraints)
    # What a tower makes, and what is done with it, has not been seen: it counts as not reached.
    return Traced(
        held,
        trained,
        found[0].first,
        speaks_for,
        constraints,
        note=f"traced block by block, because {whole}",
        reached=found[0].reached,
        loss_seen=found[0].loss_seen,
        inputs=sum(part.inputs for part in found),
    )


def _part(
    model: nn.Module,
    name: str,
    blocks: Sequence[Block],
    workload: Workload,
    trains: Trains,
    loss_on_first: bool = False,
) -> Traced:
    """Trace the module `name` of `model` by itself; what is found carries the names of the whole."""
    module = model.get_submodule(name)
    strip, inside = len(name) + 1, [block for block in blocks if within(block.name, name)]

    def outer(key: str) -> str:
        return f"{name}.{key}" if key else name  # the part itself may be one block

    inner = [
        replace(
            block,
            name=block.name[strip:],
            parameters=tuple(each[strip:] for each in block.parameters),
            buffers=tuple(each[strip:] for each in block.buffers),
        )
        for block in inside
    ]
    is_tower = inside[0].role == "tower"
    if trains is None and is_tower and workload.tuning != "full":
        trains = _nothing  # adapters are for the language model
    own = None if trains is None else partial(_under, name, trains)
    fed = supposed_pictures(model, module, workload) if is_tower else supposed_batches(module, workload)[-1]
    found = measure.trace_with(module, inner, workload, own, fed, loss_on_first)
    return Traced(
        {outer(key): each for key, each in found.held.items()},
        {outer(key): each for key, each in found.trained.items()},
        found.first,
        {outer(key): outer(speaker) for key, speaker in found.speaks_for.items()},
        found.constraints.renamed(outer),
        reached=frozenset(map(outer, found.reached)),
        loss_seen=found.loss_seen,
        inputs=found.inputs,
    )


def _nothing(_: str, __: torch.Tensor) -> bool:
    return False


def _under(part: str, trains: Callable[[str, torch.Tensor], bool], name: str, tensor: torch.Tensor) -> bool:
    return trains(f"{part}.{name}", tensor)


def _towers(blocks: Sequence[Block]) -> list[str]:
    tops: dict[str, list[str]] = {}
    for block in blocks:
        if block.role == "tower":
            tops.setdefault(block.name.partition(".")[0], []).append(block.name)
    return [_common(names) for names in tops.values()]


def _common(names: Sequence[str]) -> str:
    """Return the name of the innermost module that holds all `names`."""
    paths = [name.split(".") for name in names]
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
