"""The memory of evaluation per block, in addition to that of training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import log
from ..cache import cached
from ..memory.estimate import LOSS_BYTES_PER_LOGIT
from ..memory.structure import ModelStructure
from ..memory.workload import Workload
from .costed_model import CostedModel

if TYPE_CHECKING:
    from ..memory.tracing.evaluate import Evaluated
    from .request import Request


def with_evaluation(request: "Request", costed: CostedModel) -> CostedModel:
    """Return `costed`, the costs of training, with those of the evaluation that `request` has, if it has one."""
    evaluation = request.workload.evaluation
    if evaluation is None:
        return costed
    workload = replace(
        request.workload,
        batch_size=evaluation.batch_size,
        seq_len=evaluation.seq_len,
        accumulation=1,
        gradient_checkpointing=False,
        loss="full",
        evaluation=None,
    )
    shapes = _shapes(request.case.evaluation_batch)
    key = request.key("evaluation", workload.to_json(), costed.constraints.to_json(), shapes)
    content = cached(request.cache, key, lambda: _traced(request, costed, workload))
    if content is None:
        return costed
    throughout, most = evaluation.piled_up(content["outputs"])
    costs = tuple(
        replace(cost, evaluation=content["held"][block.name][0], evaluation_kept=content["held"][block.name][1])
        for block, cost in zip(costed.blocks, costed.costs, strict=True)
    )
    first = replace(
        costed.first, evaluation=max(content["first"][0], most - throughout), evaluation_throughout=throughout
    )
    costed = _with_records(costed, content)
    return replace(costed, costs=costs, first=first, workload=replace(costed.workload, evaluation=evaluation))


def _with_records(costed: CostedModel, content: Mapping[str, Any]) -> CostedModel:
    """Return `costed` with the allocations of an evaluation; without any where it was not traced."""
    if costed.first_record is None or not content["events"]:
        return replace(costed, records=(), first_record=None)
    events = [tuple(map(tuple, phases)) for phases in content["events"]]
    records = tuple(
        record and replace(record, evaluation=events[content["of"][block.name]])
        for block, record in zip(costed.blocks, costed.records, strict=True)
    )
    first = replace(costed.first_record, evaluation=events[content["of"][""]])
    return replace(costed, records=records, first_record=first, evaluation_outputs=content["outputs"])


def _traced(request: "Request", costed: CostedModel, workload: Workload) -> dict[str, Any] | None:
    from ..memory.tracing.errors import CannotTrace, TakesTooLong
    from ..memory.tracing.evaluate import trace_evaluation
    from ..memory.tracing.machine import tracing_for

    fed = request.case.evaluation_batch
    reason = ""
    for batch in (fed, None) if fed is not None else (_with_rows(request.case.batch, workload), None):
        try:
            with tracing_for(request.architectures, request.repeats_grouped_keys):
                case = replace(request.case, workload=workload, batch=batch)
                evaluated = trace_evaluation(case, costed.constraints)
        except CannotTrace as error:
            reason = reason or str(error)
            if isinstance(error, TakesTooLong):
                break
            continue
        return {
            "held": {name: [held.forward, held.kept] for name, held in evaluated.held.items()},
            "first": [evaluated.first.forward, evaluated.first.kept],
            "outputs": evaluated.outputs,
            **_events(evaluated),
        }
    log.debug(f"an evaluation cannot be traced: {reason}")
    return _estimated(request.case.structure, workload, request)


def _estimated(structure: ModelStructure, workload: Workload, request: "Request") -> dict[str, Any] | None:
    """Return the cost of the logits and their loss, which is most of an evaluation; None without a vocabulary."""
    config: Any = getattr(request.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    logits = workload.tokens * vocabulary
    in_head = logits * LOSS_BYTES_PER_LOGIT
    return {
        "held": {block.name: [in_head if block.role == "head" else 0, 0] for block in structure.blocks},
        "first": [2 * logits, 0],
        "outputs": 2 * logits,
        "events": [],
        "of": {},
    }


def _events(evaluated: "Evaluated") -> dict[str, Any]:
    """Return the distinct lists of allocations by phase, and the index of each block's ("": `first`)."""
    of = {
        name: tuple(tuple(phase.forward) for phase in held.phases)
        for name, held in {**evaluated.held, "": evaluated.first}.items()
    }
    distinct = list(dict.fromkeys(of.values()))
    numbers = {events: number for number, events in enumerate(distinct)}
    return {"events": distinct, "of": {name: numbers[events] for name, events in of.items()}}


def _with_rows(batch: Mapping[str, Any] | None, workload: Workload) -> dict[str, Any] | None:
    """Return a training batch with as many sequences as an evaluation has.

    None if not everything in it is by sequence, or these are not as long as the evaluation's.
    """
    import torch

    if batch is None:
        return None
    ids: Any = batch.get("input_ids")
    if ids is not None and tuple(ids.shape[1:]) != (workload.seq_len,):
        return None
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
    rows = {len(tensor) for tensor in tensors.values()}
    if len(rows) != 1 or 0 in rows:
        return None
    places = torch.arange(workload.batch_size) % rows.pop()
    return {name: tensor.index_select(0, places.to(tensor.device)) for name, tensor in tensors.items()}


def _shapes(batch: Mapping[str, Any] | None) -> Any:
    if batch is None:
        return None
    return {name: [list(value.shape), str(value.dtype)] if hasattr(value, "shape") else repr(value)
            for name, value in batch.items()}  # fmt: skip
