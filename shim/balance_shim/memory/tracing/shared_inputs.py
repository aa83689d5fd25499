"""Inputs that several blocks keep: rotary embeddings, masks.

In a trace each block has a device of its own, so each has its own copy. Of those on the device that an input comes from
none has: accelerate's hooks copy only tensors that are elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .result import Held


@dataclass(frozen=True)
class Copy:
    """A tensor that was brought to another device in the forward pass.

    Attributes:
        source: (device, number of its allocation there, or else of its storage): which tensor it is a copy of.
        recorded: whether the source was allocated while the step was recorded; if not, it was there before.
        device: where the copy is.
        number: of its allocation there.
    """

    source: tuple[int, int]
    recorded: bool
    device: int
    number: int


def with_shared(held: Mapping[int, Held], copies: Sequence[Copy]) -> dict[int, Held]:
    """Return `held` with the tensors kept until backward that each device takes from others and gives to them."""
    kept_sizes = {device: _kept(device_held) for device, device_held in held.items()}
    takers: dict[tuple[int, int], dict[int, int]] = {}
    permanent = set()
    for copy in copies:
        size = kept_sizes[copy.device].get(copy.number)
        if size is not None:
            sizes = takers.setdefault(copy.source, {})
            sizes[copy.device] = sizes.get(copy.device, 0) + size
        if not copy.recorded or copy.source[1] in kept_sizes[copy.source[0]]:
            permanent.add(copy.source)
    result = dict(held)
    for tensor, (source, sizes) in enumerate(takers.items()):
        if source not in permanent and len(sizes) == 1:
            continue  # hidden states, which only the next block has
        giver = result[source[0]]
        result[source[0]] = replace(giver, gives=(*giver.gives, (tensor, source in permanent)))
        for device, size in sizes.items():
            result[device] = replace(result[device], takes=(*result[device].takes, (tensor, size)))
    return result


def _kept(held: Held) -> dict[int, int]:
    """Return number -> bytes of the allocations that are there at the end of the forward pass."""
    sizes: dict[int, int] = {}
    number = 0
    for phase in held.phases:
        for event in phase.forward:
            if event >= 0:
                sizes[number] = event
                number += 1
            else:
                sizes.pop(-1 - event)
    return sizes
