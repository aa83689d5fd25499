"""Measure the memory of each block in a training step: copy the model, place it, run it, read the ledger."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ...timing.work import INPUTS, PREVIOUS, BlockWork
from ..blocks import Block, anchors, holder_of, within
from ..colocation import NO_CONSTRAINTS, Constraints, of_the_loss
from ..recomputation import can_be_recomputed
from ..structure import ModelStructure
from ..training_case import TrainingCase, Trains
from . import adapters, batch, layers
from .errors import CannotTrace, TakesTooLong
from .inputs import TARGETS
from .machine import MOST_DEVICES, tracing
from .model_copy import copy_of, traced_copy
from .origins import CrossesDevices, Origins
from .result import ELSEWHERE, Held, Placed, Traced
from .run import place_inputs, training_step
from .shared_inputs import with_shared

if TYPE_CHECKING:
    from torch import Tensor

LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # attributes: how often a layer is left out
MOST_ROUNDS = 6  # of looking for constraints; one run finds all that its own device map shows


def trace_with(case: TrainingCase, fed: Mapping[str, Any]) -> Traced:
    """Trace the model fed with a batch: one of its repeated layers, or all of them where they cannot be told apart."""
    constraints = of_the_loss(case.structure) if case.loss_on_first else NO_CONSTRAINTS
    sample = layers.sample(case.model, case.structure)
    once = partial(_trace, case, fed)
    if sample.whole:
        return _colocated(partial(once, sample), constraints)
    # A layer that speaks for others cannot have a constraint that they would need, too.
    try:
        return _colocated(partial(once, sample), constraints, case.structure.named("layer", "tower"))
    except TakesTooLong:
        raise
    except CannotTrace:
        return _colocated(partial(once, layers.everything(case.structure.blocks)), constraints)


def _colocated(
    trace_under: Callable[[Constraints], Traced], constraints: Constraints, free: frozenset[str] = frozenset()
) -> Traced:
    """Trace, and again with the constraints that it has shown, as long as operations meet tensors of two devices.

    Args:
        free: the names of the blocks that get no constraints.
    """
    for _ in range(MOST_ROUNDS):
        try:
            return trace_under(constraints)
        except CrossesDevices as error:
            more = constraints.with_all(error.met)
            if more == constraints or not free.isdisjoint(frozenset().union(*error.met)):
                raise
            constraints = more
    raise CannotTrace("the model keeps computing across other blocks")


def _trace(case: TrainingCase, fed: Mapping[str, Any], sample: layers.Sample, constraints: Constraints) -> Traced:
    running = [block for block in case.structure.blocks if block.name not in sample.left_out]
    leads = anchors(running)
    devices = a_device_each(case.structure, running, constraints)
    placed = run_placed(case, devices, fed, sample.left_out)
    by_device = dict(placed.held)
    work = _work(running, devices, placed.held)
    first = ELSEWHERE if constraints.on_first else by_device.pop(0)
    held = {}
    for position, block in reversed(list(enumerate(running))):
        # Of blocks that share a device, because they are tied, the last one has it all; followers add nothing.
        if leads[position] == position:
            held[block.name] = by_device.pop(devices[block.name], ELSEWHERE)
    reached = frozenset(name for name, speaker in sample.speaks_for.items() if speaker in placed.reached)
    return Traced(
        held,
        placed.trained,
        first,
        sample.speaks_for,
        constraints,
        reached=reached,
        loss_seen=not TARGETS.isdisjoint(fed),
        ranks=_ranks(case.structure.blocks, placed.began),
        inputs=placed.inputs,
        work=work,
    )


def _work(blocks: Sequence[Block], devices: Mapping[str, int], held: Mapping[int, Held]) -> dict[str, BlockWork]:
    """Return the work of each block that ran. Of blocks that share a device the first has it all.

    A layer takes its input from the one ahead of it: that holds for those that it speaks for, too, whichever is ahead.
    """
    first_on: dict[int, str] = {}
    for block in blocks:
        first_on.setdefault(devices[block.name], block.name)
    first_on[0] = INPUTS
    result = {}
    for position, block in enumerate(blocks):
        device = devices[block.name]
        device_work = held[device].work if device in held else None
        if first_on[device] != block.name or device_work is None:
            result[block.name] = BlockWork()
            continue
        ahead = devices[blocks[position - 1].name] if position else 0

        def name_of(source: int, ahead: int = ahead) -> str:
            return PREVIOUS if source == ahead != 0 else first_on.get(source, INPUTS)

        result[block.name] = device_work.of_block(name_of)
    combined = held[0].work if 0 in held else None
    result[INPUTS] = BlockWork() if combined is None else combined.of_block(lambda source: first_on.get(source, INPUTS))
    return result


def _ranks(blocks: Sequence[Block], began: Mapping[str, int]) -> dict[str, int]:
    """Return block name -> when it began, the number of an event; of one that was not called, when the one ahead did.

    Layers that another one speaks for are not called. They follow the layer ahead of them in the chain.
    """
    ranks: dict[str, int] = {}
    last = 0
    for block in blocks:
        last = ranks[block.name] = began.get(block.name, last)
    return ranks


def run_placed(
    case: TrainingCase,
    devices: Mapping[str, int],
    fed: Mapping[str, Any],
    left_out: Collection[str],
    recomputed: Collection[str] | None = None,
) -> Placed:
    """Run a training step with each block on its device.

    Args:
        devices: name of each block that runs -> index of its device; inputs arrive on device 0. Layers that do not
            run may be in it, whose inputs then arrive on their devices all the same.
        fed: the inputs, on any device.
        left_out: the names of layers that do not run.
        recomputed: the names of the layers that recompute their activations; None: as the workload has it.
    """
    blocks = case.structure.blocks
    running = [block for block in blocks if block.name not in left_out]
    placed = [block.name for block in blocks if block.name in devices and block.kind != "tensor"]
    switches = (
        {block.name: block.name in recomputed for block in running if can_be_recomputed(block)} if recomputed else None
    )
    model, trains, left_out = as_supposed(case, left_out)
    with tracing(1 + max(devices.values())) as machine:
        twin = traced_copy(model, machine, by_prefix(devices), left_out, trains)
        _drop_no_layers(twin)
        trained = _trained(twin, running)
        place_inputs(twin, {name: devices[name] for name in placed}, machine)
        origins = Origins(twin, devices, machine)
        try:
            arriving = batch.on_first_device(fed, model, machine)
            inputs = batch.size_of(arriving)
            held = training_step(twin, arriving, case.workload, machine, case.trains is None, switches)
        except TakesTooLong:
            raise
        except CannotTrace:
            origins.check()  # with copies of ours in the graph the backward pass fails, which tells nothing
            raise
        origins.check()
        del twin
    return Placed(with_shared(held, origins.copies), trained, origins.reached, origins.began, inputs)


def _drop_no_layers(twin: nn.Module) -> None:
    """Have all layers run: speech models leave out some at random in training, none of which has to be met here."""
    owners = (owner for module in twin.modules() for owner in (module, getattr(module, "config", None)))
    for owner in {id(owner): owner for owner in owners}.values():
        for name in LAYER_DROP:
            if isinstance(getattr(owner, name, None), float):
                setattr(owner, name, 0.0)


def as_supposed(case: TrainingCase, left_out: Collection[str]) -> tuple[nn.Module, Trains | None, Collection[str]]:
    """Return the model to trace, which of its parameters train, and which layers are still to be left out of it."""
    model, blocks, tuning = case.model, case.structure.blocks, case.workload.tuning
    if case.trains is not None:
        return model, case.trains, left_out
    if tuning == "lora":
        bare = copy_of(model, lambda _, tensor: tensor.detach().to("meta"), left_out)
        return adapters.with_adapters(bare, blocks), lambda _, parameter: parameter.requires_grad, ()
    towers = [block.name for block in blocks if block.role == "tower"] if tuning == "frozen" else []
    return model, lambda name, _: not any(within(name, tower) for tower in towers), left_out


def a_device_each(structure: ModelStructure, blocks: Sequence[Block], constraints: Constraints) -> dict[str, int]:
    """Return block name -> device in the trace: one each from 1 on; tied or colocated blocks and followers share one.

    Blocks that are colocated to the first device are on device 0, with those that are tied to them.

    Args:
        blocks: those of the model that run.

    Raises:
        CannotTrace: there are more blocks than devices.
    """
    leads = list(anchors(blocks))
    for group in (*structure.ties, *constraints.groups):
        shared = {
            leads[position]
            for position, block in enumerate(blocks)
            if block.name in group or not group.isdisjoint(block.parameters)
        }
        leads = [min(shared) if lead in shared else lead for lead in leads]
    home = {lead for block, lead in zip(blocks, leads, strict=True) if block.name in constraints.on_first}
    numbers = {lead: number for number, lead in enumerate(sorted(set(leads) - home), start=1)}
    numbers |= dict.fromkeys(home, 0)
    if len(numbers) >= MOST_DEVICES:
        raise CannotTrace(f"{structure.model_class} has more distinct blocks than there are devices to trace on")
    return {block.name: numbers[lead] for block, lead in zip(blocks, leads, strict=True)}


def by_prefix(devices: Mapping[str, int]) -> Callable[[str], int]:
    """Return a function from a tensor's name to the device of the block that it is in."""

    def device_of(name: str) -> int:
        holder = holder_of(name, devices)
        return 0 if holder is None else devices[holder]

    return device_of


def _trained(twin: nn.Module, blocks: Sequence[Block]) -> "dict[str, list[Tensor]]":
    """Return the parameters that train, each with the last of the blocks that hold it."""
    last: dict[int, tuple[str, Any]] = {}
    names = [block.name for block in blocks]
    owner = by_prefix({name: position for position, name in enumerate(names)})
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            last[id(parameter)] = (names[owner(name)], parameter)
    trained: dict[str, list[Any]] = {name: [] for name in names}
    for block, parameter in last.values():
        trained[block].append(parameter.raw)
    return trained
