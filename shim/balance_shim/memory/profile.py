"""The memory of each block in training: weights as they are loaded, the rest from a trace of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..optimizers import Optimizer, optimizer_named
from . import estimate, replay
from .blocks import Block
from .colocation import NO_CONSTRAINTS, Constraints, of_the_loss
from .cost import LAST, TRACED, BlockCost, CostSource, Phase
from .peak import Schedule
from .recomputation import is_supported
from .replay import Record
from .ties import tied_groups
from .workload import Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .tracing.result import Held, Traced

ParameterBytes = Callable[[str, "Tensor"], float]

_TOO_LONG: CostSource = "formula after time-out"


@dataclass(frozen=True)
class Profile:
    """The cost of each block under a workload.

    Attributes:
        costs: in the order of the blocks.
        first: what the device holds where inputs arrive and outputs return to, beside its blocks and behind them.
        schedule: how the costs of a device combine.
        method: how they were found, for people: "traced", or what could not be traced and why.
        source: the same as data.
        constraints: which blocks have to share a device.
        math_attention: the types in which attention runs as plain matrix products, which keep S x S probabilities.
        repeats_grouped_keys: whether keys and values are repeated for all heads, so that it does not.
        records: the allocations of each block, in the order of the blocks; None for one that was not traced.
        first_record: those of `first`; None without a trace.
        unreached: the names of the blocks with parameters that no dry run has reached: nobody knows what they meet.
    """

    costs: tuple[BlockCost, ...]
    first: BlockCost
    schedule: Schedule
    method: str
    source: CostSource = "trace"
    constraints: Constraints = NO_CONSTRAINTS
    math_attention: tuple[str, ...] = ()
    repeats_grouped_keys: bool = False
    records: tuple[Record | None, ...] = ()
    first_record: Record | None = None
    unreached: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": [asdict(cost) for cost in self.costs],
            "first": asdict(self.first),
            "schedule": asdict(self.schedule),
            "method": self.method,
            "source": self.source,
            "constraints": self.constraints.to_json(),
            "math_attention": self.math_attention,
            "repeats_grouped_keys": self.repeats_grouped_keys,
            "unreached": sorted(self.unreached),
            "records": replay.to_json([self.first_record, *self.records]),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Profile":
        """Return the profile that `to_json` has been called on."""
        costs = tuple(map(BlockCost.from_json, found["costs"]))
        first, schedule = BlockCost.from_json(found["first"]), Schedule(**found["schedule"])
        constraints, unreached = Constraints.from_json(found["constraints"]), frozenset(found["unreached"])
        attention = tuple(found["math_attention"]), found["repeats_grouped_keys"]
        first_record, *records = replay.from_json(found["records"])
        found_so = found["method"], found["source"], constraints
        return cls(costs, first, schedule, *found_so, *attention, tuple(records), first_record, unreached)


def profile(
    model: "nn.Module",
    blocks: Sequence[Block],
    workload: Workload,
    parameter_bytes: ParameterBytes | None = None,
    trains: "Callable[[str, Tensor], bool] | None" = None,
    batch: Mapping[str, Any] | None = None,
    loss_on_first: bool = False,
) -> Profile:
    """Return the profile of `model`. Tied parameters count with the last of their blocks.

    Args:
        model: the model that `blocks` was made from, on any device, the meta device included; left as it is.
        workload: what to train with.
        parameter_bytes: the bytes of a whole parameter as it will be loaded; by default as it is now. Quantizers
            know better (see `upstream/weight_sizes.py`).
        trains: which parameters get gradients; by default what `workload.tuning` supposes. Where it is given, adapters
            are parameters of the model already and none are supposed.
        batch: what the model gets in training; by default what its config suggests.
        loss_on_first: whether the model computes its loss where its inputs arrive; see `upstream/loss_device.py`.
    """
    optimizer = optimizer_named(workload.optimizer)
    schedule = Schedule(workload.accumulation > 1, optimizer.at_once, workload.replicated)
    own = _own_parameters(model, blocks)
    tensors = _weight_bytes(model, blocks, own, parameter_bytes)
    weights = [sum(sizes) for sizes in tensors]
    found, method, source = _trace(model, blocks, workload, trains, batch, loss_on_first)
    supposed = replace(workload, gradient_checkpointing=workload.gradient_checkpointing and is_supported(model))
    embeddings = _embeddings(model)
    fresh = {} if found and found.ranks else _fresh_gradients(model, blocks, own, workload, trains)
    costs = []
    records: list[Record | None] = []
    untraced = []
    for block, held_weights, sizes in zip(blocks, weights, tensors, strict=True):
        cost = _traced_cost(block, held_weights, found, optimizer, schedule) if found else None
        records.append(_record(block, sizes, found, optimizer) if found and cost is not None else None)
        if cost is None:
            if found and own[block.name]:
                untraced.append(block.name)
            cost = _estimated_cost(block, held_weights, own[block.name], supposed, optimizer, schedule, trains)
        if optimizer.spares_embeddings:
            trained = _supposedly_trained(block, own[block.name], workload, trains)
            values = sum(each.numel() for each in trained if id(each) in embeddings)
            cost = replace(cost, optimizer=cost.optimizer + optimizer.spared_bytes(values))
        if block.name in fresh:
            arriving = 0 if schedule.accumulating else cost.gradients
            cost = replace(cost, backward=max(cost.backward, arriving) + fresh[block.name])
        costs.append(replace(cost, rank=found.ranks.get(block.name, 0)) if found else cost)
    first = _traced_first(found, workload) if found else _returned(blocks, costs)
    if untraced:
        method = f"{method}, but for {_listed(untraced)}, which that does not reach: estimated by a formula"
    constraints = found.constraints if found else of_the_loss(blocks) if loss_on_first else NO_CONSTRAINTS
    reached = found.reached if found else frozenset()
    unreached = frozenset(block.name for block in blocks if block.parameters and block.name not in reached)
    if found and batch is None and not found.loss_seen and takes_targets(model):
        unreached |= of_the_loss(blocks).on_first  # nobody has seen where they meet their targets
    first_record = replace(replay.record_of(found.first.phases), weights=(first.weights,)) if found else None
    return Profile(
        tuple(costs),
        first,
        schedule,
        method,
        source,
        constraints,
        records=tuple(records),
        first_record=first_record,
        unreached=unreached,
    )


def _trace(
    model: "nn.Module",
    blocks: Sequence[Block],
    workload: Workload,
    trains: "Callable[[str, Tensor], bool] | None",
    batch: Mapping[str, Any] | None,
    loss_on_first: bool,
) -> "tuple[Traced | None, str, CostSource]":
    """Return what a trace found, None if there can be none, and the method in words and as data."""
    from .tracing import too_long
    from .tracing.errors import CannotTrace, TakesTooLong
    from .tracing.trace import trace

    if too_long.is_known(model, "trace", workload.seq_len):
        return None, "estimated by a formula, because a trace took too long before", _TOO_LONG
    reasons: list[str] = []
    for fed in [None] if batch is None else [batch, None]:
        try:
            found = trace(model, blocks, workload, trains, fed, loss_on_first)
            supposed = f"traced with an assumed batch, because {reasons[0]}" if reasons else TRACED
            return found, found.note or supposed, "blockwise trace" if found.note else "trace"
        except CannotTrace as error:
            reasons.append(str(error))
            if isinstance(error, TakesTooLong):
                too_long.note(model, "trace", workload.seq_len)
                return None, f"estimated by a formula, because {error}", _TOO_LONG
    return None, f"estimated by a formula, because {reasons[0]}", "formula"


def takes_targets(model: "nn.Module") -> bool:
    """Whether `model` takes something to compare its outputs with, so that it computes a loss."""
    from .tracing.inputs import targets_of

    return bool(targets_of(model))


def _traced_cost(
    block: Block, weights: int, found: "Traced", optimizer: Optimizer, schedule: Schedule
) -> BlockCost | None:
    """Return the cost of `block` as the trace has it; None if it was not reached."""
    speaker = found.speaks_for[block.name]
    if speaker not in found.trained:  # of a part that was not traced
        return None
    held, trained = found.held.get(speaker), found.trained[speaker]
    gradients = sum(each.numel() * each.element_size() for each in trained)
    if held is None:  # a follower, which has next to nothing
        return BlockCost(weights=weights)
    if not held.ran and (trained or block.role == "tower"):
        return None
    return BlockCost(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer.state_bytes(trained),
        activations=held.kept,
        forward=held.forward,
        backward=held.backward,
        step=optimizer.step_bytes(trained),
        phases=_phases(held, found, 0 if schedule.accumulating else gradients) if _is_alone(block, found) else (),
    )


def _is_alone(block: Block, found: "Traced") -> bool:
    """Whether `block` was traced itself and speaks for no other, so that its phases are when it computes."""
    speakers = found.speaks_for
    return sum(speaker == speakers[block.name] for speaker in speakers.values()) == 1


def _phases(held: "Held", found: "Traced", gradients: int) -> tuple[Phase, ...]:
    """Return the phases of a device; none for a single one, or where they cannot be compared with other blocks'.

    Args:
        gradients: bytes of gradients that appear in the backward pass; they count as the first phase's, whose backward
            pass is the last one.
    """
    if len(held.phases) < 2 or not found.ranks:
        return ()
    return tuple(
        Phase(
            rank=phase.start,
            activations=phase.kept,
            forward=phase.most_forward,
            backward=phase.most_backward,
            residue=phase.left - (0 if number else gradients),
        )
        for number, phase in enumerate(held.phases)
    )


def _record(block: Block, weights: list[int], found: "Traced", optimizer: Optimizer) -> Record:
    """Return the allocations of `block`, which was traced."""
    speaker = found.speaks_for[block.name]
    held, trained = found.held.get(speaker), found.trained[speaker]
    if held is None:  # a follower: its allocations are among those of the block that it shares a device with
        return Record(weights=tuple(weights))
    return replace(
        replay.record_of(held.phases),
        weights=tuple(weights),
        gradients=tuple(each.numel() * each.element_size() for each in trained),
        state=optimizer.state_tensors(trained),
        step=optimizer.step_tensors(trained),
    )


def _traced_first(found: "Traced", workload: Workload) -> BlockCost:
    """Return the cost of the device where inputs arrive; its last phase, where outputs return, is behind all blocks.

    The Trainer has the inputs of all micro-batches of a step there at once, until the optimizer has taken it
    (`Trainer.get_batch_samples`, from transformers 4.46 on).
    """
    held = found.first
    return BlockCost(
        weights=found.inputs * workload.accumulation,
        activations=held.kept,
        forward=held.forward,
        backward=held.backward,
        rank=held.phases[-1].start if held.phases and found.ranks else LAST,
        phases=_phases(held, found, 0),
    )


def _estimated_cost(
    block: Block,
    weights: int,
    own: "Mapping[str, Tensor]",
    workload: Workload,
    optimizer: Optimizer,
    schedule: Schedule,
    trains: "Callable[[str, Tensor], bool] | None",
) -> BlockCost:
    trained = _supposedly_trained(block, own, workload, trains)
    gradients = sum(each.numel() * each.element_size() for each in trained)
    guess = estimate.activations(block, list(own.values()), workload)
    arriving = 0 if schedule.accumulating else gradients
    return BlockCost(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer.state_bytes(trained),
        activations=guess.kept,
        forward=guess.kept + guess.temporary,
        backward=guess.kept + guess.temporary + arriving,
        step=optimizer.step_bytes(trained),
    )


def _fresh_gradients(
    model: "nn.Module",
    blocks: Sequence[Block],
    own: "Mapping[str, Mapping[str, Tensor]]",
    workload: Workload,
    trains: "Callable[[str, Tensor], bool] | None",
) -> dict[str, int]:
    """Return block name -> bytes of its gradients of tied parameters, which are added to those of later blocks.

    So for a moment there are two: for an embedding that is tied to the head when all other gradients are there, too.
    """
    found: dict[str, int] = {}
    for group in tied_groups(model):
        *earlier, last = [block for block in blocks if not group.isdisjoint(block.parameters)]
        shared = {name: each for name, each in own[last.name].items() if name in group}
        size = sum(each.numel() * each.element_size() for each in _supposedly_trained(last, shared, workload, trains))
        for block in earlier if workload.tuning != "lora" or trains is not None else ():
            found[block.name] = found.get(block.name, 0) + size
    return found


def _supposedly_trained(
    block: Block,
    own: "Mapping[str, Tensor]",
    workload: Workload,
    trains: "Callable[[str, Tensor], bool] | None",
) -> "list[Tensor]":
    import torch

    if trains is not None:
        return [tensor for name, tensor in own.items() if trains(name, tensor)]
    if workload.tuning == "lora":
        values = estimate.adapter_values(block, list(own.values()))
        return [torch.empty(values, dtype=torch.float32, device="meta")] if values else []
    if workload.tuning == "frozen" and block.role == "tower":
        return []
    return [tensor for tensor in own.values() if tensor.is_floating_point()]


def _embeddings(model: "nn.Module") -> set[int]:
    """Return the identities of the parameters that are, or will be tied to, the weight of an `nn.Embedding`."""
    from torch import nn

    parameters = dict(model.named_parameters(remove_duplicate=False))
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for group in tied_groups(model):
        identities = {id(parameters[name]) for name in group}
        if identities & looked_up:
            looked_up |= identities
    return looked_up


def _own_parameters(model: "nn.Module", blocks: Sequence[Block]) -> "dict[str, dict[str, Tensor]]":
    """Return block name -> its parameters; what is or will be tied is with the last of its blocks only."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    identity: dict[str, Any] = {name: -1 - number for number, group in enumerate(tied_groups(model)) for name in group}
    last = {identity.get(name, id(parameters[name])): name for block in blocks for name in block.parameters}
    return {
        block.name: {
            name: parameters[name]
            for name in block.parameters
            if last[identity.get(name, id(parameters[name]))] == name
        }
        for block in blocks
    }


def _weight_bytes(
    model: "nn.Module",
    blocks: Sequence[Block],
    own: "Mapping[str, Mapping[str, Tensor]]",
    parameter_bytes: ParameterBytes | None,
) -> list[list[int]]:
    """Return the bytes of each tensor of each block."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    size_of = parameter_bytes or (lambda _, tensor: tensor.numel() * tensor.element_size())
    return [
        [
            *(int(size_of(name, tensor)) for name, tensor in own[block.name].items()),
            *(buffers[name].numel() * buffers[name].element_size() for name in block.buffers),
        ]
        for block in blocks
    ]


def _returned(blocks: Sequence[Block], costs: Sequence[BlockCost]) -> BlockCost:
    """Return the copy of the outputs that arrives on the first device, where nothing was traced."""
    logits = sum(cost.activations for block, cost in zip(blocks, costs, strict=True) if block.role == "head")
    return BlockCost(forward=logits, rank=LAST)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more blocks"
