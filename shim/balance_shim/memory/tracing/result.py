"""The result of a trace."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..colocation import NO_CONSTRAINTS, Constraints

if TYPE_CHECKING:
    from torch import Tensor

    from ...timing.recorder import DeviceWork
    from ...timing.work import BlockWork
    from .phases import TracedPhase


@dataclass(frozen=True)
class Held:
    """The memory of one device besides its weights, in bytes.

    Attributes:
        forward: the most in the forward pass.
        kept: at its end, when only the tensors that backward needs are left.
        backward: the most in the backward pass; gradients of earlier micro-batches do not count.
        ran: whether anything was computed there.
        phases: when it computed, in order; none where it did not.
        takes: (number of a tensor, bytes) of the inputs that it keeps a copy of, and that `gives` of another device
            has.
        work: its operations and copies in a micro-batch; None: not counted.
        gives: (number of a tensor, whether it is kept there in any case) of what several blocks have copies of.
    """

    forward: int
    kept: int
    backward: int
    ran: bool
    phases: "tuple[TracedPhase, ...]" = ()
    takes: tuple[tuple[int, int], ...] = ()
    gives: tuple[tuple[int, bool], ...] = ()
    work: "DeviceWork | None" = None


ELSEWHERE = Held(0, 0, 0, ran=True)  # for a block whose bytes are counted with those of another one


@dataclass(frozen=True)
class Traced:
    """The result of a trace, for each block that ran in it.

    Attributes:
        held: block name -> bytes besides weights.
        trained: block name -> its parameters that train, as meta tensors.
        first: bytes on the device where inputs arrive and outputs return to.
        speaks_for: name of any block -> name of the block in the trace that is like it.
        constraints: which blocks it could only be run with on one device.
        note: how it was traced, where that was not as a whole; "" otherwise.
        reached: the names of the blocks that took part in the step, and of those that such blocks speak for.
        loss_seen: whether the model was given targets, so that its loss was computed.
        ranks: block name -> its place in the forward pass, comparable with the starts of phases; empty where parts were
            traced one by one, whose phases cannot be compared.
        inputs: bytes of a batch, on the device where it arrives.
        work: name of each block that ran -> its operations and copies; "": those where inputs arrive.
    """

    held: dict[str, Held]
    trained: "dict[str, list[Tensor]]"
    first: Held
    speaks_for: dict[str, str]
    constraints: Constraints = NO_CONSTRAINTS
    note: str = ""
    reached: frozenset[str] = frozenset()
    loss_seen: bool = True
    ranks: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    work: "dict[str, BlockWork]" = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """A training step of a model with its blocks on devices of the trace.

    Attributes:
        held: index of each device -> bytes besides weights.
        trained: block name -> its parameters that train, as meta tensors.
        reached: the names of the blocks that took part in the step.
        began: block name -> the number of the event ahead of which it was first called.
        inputs: bytes of the batch.
    """

    held: dict[int, Held]
    trained: "dict[str, list[Tensor]]"
    reached: frozenset[str]
    began: dict[str, int]
    inputs: int
