"""Liger's forward of a model computes head and loss in one kernel, which reads the head's weight itself.

No hook of the head brings the hidden states to it then (Liger 0.8, `lce_forward`), and a kernel that gets addresses of
two devices fails, or reads over the link. So the final norm, which makes the hidden states, and the head are together.
"""

from typing import TYPE_CHECKING, Any

from ..memory.colocation import NO_CONSTRAINTS, Constraints
from ..memory.structure import ModelStructure
from .costed_model import CostedModel
from .places import device_of
from .plan import Plan

if TYPE_CHECKING:
    from torch import nn

FORWARD = "lce_forward"
PACKAGE = "liger_kernel"


def constraints_for(model: "nn.Module", structure: ModelStructure, arguments: Any | None) -> Constraints:
    """Return the constraints of the blocks behind the last layer, if the forward of `model` is, or will be, Liger's.

    Args:
        structure: that of `model`.
        arguments: the `TrainingArguments`, whose `use_liger_kernel` has the Trainer bind it when training begins.
    """
    if not (getattr(arguments, "use_liger_kernel", False) or _is_ligers(model)):
        return NO_CONSTRAINTS
    behind = frozenset(block.name for block in structure.end if block.parameters)
    return Constraints((behind,)) if len(behind) > 1 else NO_CONSTRAINTS


def breaks(plan: Plan, constraints: Constraints, costed: CostedModel) -> bool:
    """Whether the map of `plan` has blocks on two devices that `constraints` want on one."""
    names = {block.name for block in costed.blocks}
    groups = [group & names for group in constraints.groups]
    return any(len({device_of(name, plan.device_map) for name in group}) > 1 for group in groups)


def _is_ligers(model: "nn.Module") -> bool:
    """Whether the forward of `model` is Liger's: bound to it, wrapped by accelerate, or that of its class."""
    forwards = (vars(model).get("forward"), vars(model).get("_old_forward"), type(model).forward)
    return any(
        getattr(forward, "__name__", "") == FORWARD
        and str(getattr(forward, "__module__", "")).partition(".")[0] == PACKAGE
        for forward in forwards
    )
