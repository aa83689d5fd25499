"""Models that do not run on assumed inputs: the language model and each tower are traced separately."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch

from ...timing.work import BlockWork
from ..colocation import NO_CONSTRAINTS
from ..recomputation import is_supported
from ..training_case import TrainingCase
from . import measure
from .errors import CannotTrace
from .inputs import supposed_batches, supposed_pictures
from .result import Held, Traced


def trace_parts(case: TrainingCase, failure: CannotTrace) -> Traced:
    """Trace the language model and each tower of a model separately. Blocks between them are left to the formula.

    Raises:
        CannotTrace: `failure`, that of the model in one run, if no language model inside it can be traced separately.
    """
    if not is_supported(case.model):  # a model inside may support it, and is not asked
        case = case.with_workload(gradient_checkpointing=False)
    structure = case.structure
    text = _common(structure.named("embedding", "layer", "head")) or _common(structure.named("embedding", "layer"))
    if not text:
        raise failure
    try:
        traces = [_part(case, text)]
    except CannotTrace:
        raise failure from None  # of the class that is trained, not of one inside of it
    for tower in structure.towers:
        try:
            traces.append(_part(replace(case, loss_on_first=False), _common(tower)))
        except CannotTrace:
            continue  # the formula has a figure for it
    held: dict[str, Held] = {}
    trained: dict[str, list[torch.Tensor]] = {}
    speaks_for = {block.name: block.name for block in structure.blocks}
    constraints = NO_CONSTRAINTS
    work: dict[str, BlockWork] = {}
    for part in reversed(traces):  # the first one has the inputs
        work |= part.work
    for part in traces:
        held |= part.held
        trained |= part.trained
        speaks_for |= part.speaks_for
        constraints = constraints.and_those(part.constraints)
    # How the model uses the output of a tower has not been seen, so towers count as not reached.
    return Traced(
        held,
        trained,
        traces[0].first,
        speaks_for,
        constraints,
        note=f"traced block by block, because {failure}",
        reached=traces[0].reached,
        loss_seen=traces[0].loss_seen,
        inputs=sum(part.inputs for part in traces),
        work=work,
    )


def _part(case: TrainingCase, name: str) -> Traced:
    """Trace the module `name` by itself; the result has names as in the model."""
    model, workload, trains = case.model, case.workload, case.trains
    module = model.get_submodule(name)
    structure = case.structure.part(name, module)
    is_tower = structure.blocks[0].role == "tower"
    if trains is None and is_tower and workload.tuning != "full":
        trains = _nothing  # adapters are for the language model
    own = None if trains is None else partial(_under, name, trains)
    fed = supposed_pictures(model, module, workload) if is_tower else supposed_batches(module, workload)[-1]
    inner = TrainingCase(module, workload, structure, trains=own, loss_on_first=case.loss_on_first)
    traced = measure.trace_with(inner, fed)

    def outer(key: str) -> str:
        return f"{name}.{key}" if key else name  # the part itself may be one block

    return Traced(
        {outer(key): held for key, held in traced.held.items()},
        {outer(key): trained for key, trained in traced.trained.items()},
        traced.first,
        {outer(key): outer(speaker) for key, speaker in traced.speaks_for.items()},
        traced.constraints.renamed(outer),
        reached=frozenset(map(outer, traced.reached)),
        loss_seen=traced.loss_seen,
        inputs=traced.inputs,
        work={key and outer(key): work.renamed(outer) for key, work in traced.work.items()},
    )


def _nothing(_: str, __: torch.Tensor) -> bool:
    return False


def _under(part: str, trains: Callable[[str, torch.Tensor], bool], name: str, tensor: torch.Tensor) -> bool:
    return trains(f"{part}.{name}", tensor)


def _common(names: Iterable[str]) -> str:
    """Return the name of the innermost module that holds all `names`."""
    paths = [name.split(".") for name in names]
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
