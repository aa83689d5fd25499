"""The optimizer state of one training, for the next one of the same trainer: Adam's moments go on, as in one process.

Each training has an engine of its own, whose optimizer begins with an empty state. The state waits in host memory.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from .. import log

_resumed: "WeakSet[Any]" = WeakSet()  # engines whose state comes from a checkpoint


@dataclass(frozen=True)
class OptimizerState:
    """The state of one rank's optimizer. `layout`: DeepSpeed's id and local size of each parameter, by sub-group."""

    kind: type
    layout: list[list[tuple[int, int]]]
    states: list[dict[str, Any]]


def taken_from(engine: Any) -> OptimizerState | None:
    """Return the state of the optimizer of `engine`, which trains no more; None where it has none in memory."""
    import torch

    outer = engine.optimizer
    inner, partitions = getattr(outer, "optimizer", None), getattr(outer, "fp32_partitioned_groups_flat", None)
    if inner is None or not partitions or getattr(outer, "swap_optimizer", False):
        return None
    states = [
        {
            name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
            for name, value in inner.state.get(partition, {}).items()
        }
        for partition in partitions
    ]
    return OptimizerState(type(inner), _layout(outer), states) if any(states) else None


def resumes(engine: Any) -> None:
    """The state of `engine` comes from a checkpoint."""
    _resumed.add(engine)


def give(engine: Any, state: OptimizerState) -> None:
    """Have the optimizer of `engine` go on with `state`, unless a checkpoint has given it one."""
    import torch

    outer = engine.optimizer
    if engine in _resumed:
        return
    kind = type(outer.optimizer)
    if kind is not state.kind or _layout(outer) != state.layout:
        log.info("other parameters train than in the training before: the optimizer begins with a new state")
        return
    for partition, values in zip(outer.fp32_partitioned_groups_flat, state.states, strict=True):
        present = outer.optimizer.state[partition]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and isinstance(present.get(name), torch.Tensor):
                present[name].copy_(value)
            else:
                is_moved = isinstance(value, torch.Tensor) and value.dim() > 0  # numbers of steps are on the host
                present[name] = value.to(partition.device) if is_moved else value


def _layout(outer: Any) -> list[list[tuple[int, int]]]:
    return [[(parameter.ds_id, parameter.partition_numel()) for parameter in group] for group in outer.fp16_groups]
