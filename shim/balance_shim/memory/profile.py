"""The memory of each block in training: weights as they are loaded, the rest from a trace of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..optimizers import Optimizer, optimizer_named
from ..timing.work import INPUTS, NO_WORK, ModelWork
from . import allocation_record, estimate, traced_cost
from .allocation_record import Record
from .block_parameters import BlockParameters
from .blocks import Block
from .colocation import NO_CONSTRAINTS, Constraints, of_the_loss
from .cost import LAST, TRACED, BlockCost, CostSource
from .peak import Schedule
from .recomputation import is_supported
from .training_case import TrainingCase

if TYPE_CHECKING:
    from torch import nn

    from .tracing.result import Traced

_TOO_LONG: CostSource = "formula after time-out"


@dataclass(frozen=True)
class Profile:
    """The cost of each block under a workload.

    Attributes:
        costs: in the order of the blocks.
        first: bytes of inputs, and of outputs that return, on the device where inputs arrive.
        schedule: how the costs of a device combine.
        method: the source of the costs for people: "traced", or which blocks could not be traced and why.
        source: the same as data.
        constraints: which blocks have to share a device.
        math_attention: the types in which attention runs as plain matrix products, which keep S x S probabilities.
        repeats_grouped_keys: whether keys and values are repeated for all heads, so that it does not.
        records: the allocations of each block, in the order of the blocks; None for one that was not traced.
        first_record: those of `first`; None without a trace.
        unreached: the names of the blocks with parameters that no dry run has reached: which other blocks they share
            operations with is unknown.
        work: the operations and copies of each block in a micro-batch.
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
    work: ModelWork = NO_WORK

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
            "work": self.work.to_json(),
            "records": allocation_record.to_json([self.first_record, *self.records]),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Profile":
        """Return the profile that `to_json` has been called on."""
        first_record, *records = allocation_record.from_json(content["records"])
        return cls(
            costs=tuple(map(BlockCost.from_json, content["costs"])),
            first=BlockCost.from_json(content["first"]),
            schedule=Schedule(**content["schedule"]),
            method=content["method"],
            source=content["source"],
            constraints=Constraints.from_json(content["constraints"]),
            math_attention=tuple(content["math_attention"]),
            repeats_grouped_keys=content["repeats_grouped_keys"],
            records=tuple(records),
            first_record=first_record,
            unreached=frozenset(content["unreached"]),
            work=ModelWork.from_json(content["work"]),
        )


def profile(case: TrainingCase) -> Profile:
    """Return the cost of each block of `case`. Tied parameters count with the last of their blocks."""
    model, workload, blocks = case.model, case.workload, case.structure.blocks
    optimizer = optimizer_named(workload.optimizer)
    schedule = Schedule(workload.accumulation > 1, optimizer.at_once, workload.replicated)
    parameters = BlockParameters(case)
    traced, method, source = _trace(case)
    checkpoints = workload.gradient_checkpointing and is_supported(model)
    estimator = _Estimator(case.with_workload(gradient_checkpointing=checkpoints), parameters, optimizer, schedule)
    fresh = {} if traced and traced.ranks else parameters.fresh_gradients()
    costs = []
    records: list[Record | None] = []
    untraced = []
    for block in blocks:
        sizes = parameters.sizes(block)
        cost = traced_cost.of_block(block, sum(sizes), traced, optimizer, schedule) if traced else None
        records.append(traced_cost.record(block, sizes, traced, optimizer) if traced and cost is not None else None)
        if cost is None:
            if traced and parameters.own[block.name]:
                untraced.append(block.name)
            cost = estimator.cost(block, sum(sizes))
        if optimizer.spares_embeddings:
            cost = replace(cost, optimizer=cost.optimizer + optimizer.spared_bytes(parameters.looked_up(block)))
        if block.name in fresh:
            arriving = 0 if schedule.accumulating else cost.gradients
            cost = replace(cost, backward=max(cost.backward, arriving) + fresh[block.name])
        costs.append(replace(cost, rank=traced.ranks.get(block.name, 0)) if traced else cost)
    first = traced_cost.of_first_device(traced, workload) if traced else _returned(blocks, costs)
    if untraced:
        method = f"{method}, except for {_listed(untraced)}, which the trace does not reach: estimated by a formula"
    constraints = of_the_loss(case.structure) if case.loss_on_first else NO_CONSTRAINTS
    reached = traced.reached if traced else frozenset()
    unreached = frozenset(block.name for block in blocks if block.parameters and block.name not in reached)
    if traced and case.batch is None and not traced.loss_seen and takes_targets(model):
        unreached |= of_the_loss(case.structure).on_first  # no trace has shown where they meet their targets
    first_record = (
        replace(allocation_record.record_of(traced.first.phases), weights=(first.inputs,)) if traced else None
    )
    return Profile(
        tuple(costs),
        first,
        schedule,
        method,
        source,
        traced.constraints if traced else constraints,
        records=tuple(records),
        first_record=first_record,
        unreached=unreached,
        work=_work(blocks, traced) if traced else NO_WORK,
    )


def _work(blocks: Sequence[Block], traced: "Traced") -> ModelWork:
    """Return the work of all blocks, those that another one speaks for included."""
    of_blocks = tuple(traced.work.get(traced.speaks_for[block.name]) for block in blocks)
    return ModelWork(of_blocks, traced.work.get(INPUTS))


def _trace(case: TrainingCase) -> "tuple[Traced | None, str, CostSource]":
    """Return the result of a trace, None if there can be none, and the method in words and as data."""
    from .tracing import too_long
    from .tracing.errors import CannotTrace, TakesTooLong
    from .tracing.trace import trace

    model, seq_len = case.model, case.workload.seq_len
    if too_long.is_known(model, "trace", seq_len):
        return None, "estimated by a formula, because a trace took too long before", _TOO_LONG
    reasons: list[str] = []
    for fed in [case] if case.batch is None else [case, replace(case, batch=None)]:
        try:
            traced = trace(fed)
            assumed = f"traced with an assumed batch, because {reasons[0]}" if reasons else TRACED
            return traced, traced.note or assumed, "blockwise trace" if traced.note else "trace"
        except CannotTrace as error:
            reasons.append(str(error))
            if isinstance(error, TakesTooLong):
                too_long.note(model, "trace", seq_len)
                return None, f"estimated by a formula, because {error}", _TOO_LONG
    return None, f"estimated by a formula, because {reasons[0]}", "formula"


def takes_targets(model: "nn.Module") -> bool:
    """Whether `model` takes targets to compare its outputs with, so that it computes a loss."""
    from .tracing.inputs import targets_of

    return bool(targets_of(model))


@dataclass(frozen=True)
class _Estimator:
    """The formula for blocks that were not traced."""

    case: TrainingCase
    parameters: BlockParameters
    optimizer: Optimizer
    schedule: Schedule

    def cost(self, block: Block, weights: int) -> BlockCost:
        trained = self.parameters.trained(block)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        guess = estimate.activations(block, list(self.parameters.own[block.name].values()), self.case.workload)
        arriving = 0 if self.schedule.accumulating else gradients
        return BlockCost(
            weights=weights,
            gradients=gradients,
            optimizer=self.optimizer.state_bytes(trained),
            activations=guess.kept,
            forward=guess.kept + guess.temporary,
            backward=guess.kept + guess.temporary + arriving,
            step=self.optimizer.step_bytes(trained),
        )


def _returned(blocks: Sequence[Block], costs: Sequence[BlockCost]) -> BlockCost:
    """Return the copy of the outputs that arrives on the first device, where nothing was traced."""
    logits = sum(cost.activations for block, cost in zip(blocks, costs, strict=True) if block.role == "head")
    return BlockCost(forward=logits, rank=LAST)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more blocks"
