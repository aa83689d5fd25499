"""When each device of a trace computes: the phases of its forward pass, and the same in reverse in the backward pass.

Most blocks compute once in a pass. The device of an embedding does so again where pictures are merged into what it has
made, after the tower has run, and the first device where inputs arrive and where outputs return to it. What other
blocks hold at each of these times differs, so peaks are composed of phases.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

NO_BLOCK = 0  # the device where inputs arrive, which has no block of its own
Event = tuple[int, int, int]  # (device, allocation or free, `autograd_clock`): see `virtual.ledger.Ledger.recording`
_ACCUMULATES = 1 << 63  # torch gives nodes that accumulate gradients the largest number, so that they run at once


def autograd_clock() -> int:
    """Return the number of nodes that autograd made in the forward pass so far; in backward, that of the running node.

    Nodes are numbered as they are made, and of those that are ready the backward pass runs the last one first.
    """
    node = torch._C._current_autograd_node()
    return torch._C._autograd._get_sequence_nr() if node is None else node._sequence_nr() + 1


@dataclass
class TracedPhase:
    """A phase of one device; sizes in bytes.

    Attributes:
        start: when it starts: the number of the event in the record.
        time: the same by `autograd_clock`.
        forward: the events of the device in its forward pass.
        backward: those in its backward pass.
        kept: the bytes that it adds to those kept until the backward pass; negative where it frees more.
        most_forward: the peak, beyond the bytes that earlier phases keep.
        most_backward: the peak in its backward pass, beyond the bytes that earlier phases keep and later ones left.
        left: the bytes that its backward pass leaves, gradients included.
    """

    start: int
    time: int
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    kept: int = 0
    most_forward: int = 0
    most_backward: int = 0
    left: int = 0


def phases_of(record: Sequence[Event], cut: int) -> dict[int, list[TracedPhase]]:
    """Return the phases of each device that allocates in the forward pass.

    Args:
        record: all events of a training step in their order.
        cut: how many of them are of the forward pass.
    """
    phases = _forward(record[:cut])
    _backward(record[cut:], phases)
    for own in phases.values():
        _measure(own)
    return phases


def _forward(record: Sequence[Event]) -> dict[int, list[TracedPhase]]:
    """A phase of a device ends where it allocates again after a block elsewhere has begun."""
    phases: dict[int, list[TracedPhase]] = {}
    begun: dict[int, int] = {}  # device -> how many others had begun when it last allocated
    for number, (device, event, time) in enumerate(record):
        own = phases.setdefault(device, [])
        if event >= 0:
            begun_elsewhere = sum(other not in (device, NO_BLOCK) for other in begun)
            if not own or begun_elsewhere > begun[device]:
                own.append(TracedPhase(number, time))
            begun[device] = begun_elsewhere
        if own:
            own[-1].forward.append(event)
    return {device: own for device, own in phases.items() if own}


def _backward(record: Sequence[Event], phases: dict[int, list[TracedPhase]]) -> None:
    """Assign the events of the backward pass to the phases whose operations it goes through.

    The gradient that an operation takes is freed when the one behind it runs, so frees are assigned by the operation
    before. Operations that are new, because an activation checkpoint made them, belong to what runs already.
    """
    reached: dict[int, int] = {device: len(own) - 1 for device, own in phases.items()}
    now = before = _ACCUMULATES
    for device, event, time in record:
        if time != now and time < _ACCUMULATES:
            now, before = time, now
        own = phases.get(device)
        if own is not None:
            running = now if event >= 0 else before
            ahead = [number for number, phase in enumerate(own) if phase.time <= running]
            reached[device] = min(reached[device], max(ahead, default=0))
            own[reached[device]].backward.append(event)


def _measure(own: Sequence[TracedPhase]) -> None:
    sizes: list[int] = []
    live = 0

    def most(events: Sequence[int]) -> int:
        """Follow `events`; return the peak."""
        nonlocal live
        peak = live
        for event in events:
            if event >= 0:
                sizes.append(event)
            live += event if event >= 0 else -sizes[-1 - event]
            peak = max(peak, live)
        return peak

    live_before = []  # ahead of each phase
    for phase in own:
        live_before.append(live)
        phase.most_forward = most(phase.forward) - live_before[-1]
        phase.kept = live - live_before[-1]
    left = 0
    for phase, before in zip(reversed(own), reversed(live_before), strict=True):
        phase.most_backward = most(phase.backward) - before - left
        phase.left = live - before - left
        left += phase.left
