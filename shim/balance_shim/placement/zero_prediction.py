"""Memory and step time of ZeRO-3, predicted from the costs of a model's blocks.

Each rank has a device, an equal part of weights, gradients and optimizer state, and all activations of its own
sequences. Weights are gathered for the forward and the backward pass of a block, and its gradients reduced, over the
links of the devices, while the device computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..device import Device
from ..memory.peak import peak_terms
from ..timing.clock import origin_of
from ..timing.measured import host_of
from ..timing.micro_batches import HOOKED
from ..timing.rates import DeviceRates, HostRates
from ..timing.step_time import Bound, StepTime
from .costed_model import CostedModel
from .step_time import CLIPPING, FOREACH, rates_of_all, tokens_of

Offload = Literal["none", "optimizer", "all"]

LIVE = 0.05  # of the smallest device: what may be gathered at a time (`zero.config.live_parameters`)
STEP = 400_000_000  # bytes of float32 gradients in a step of the optimizer (`sub_group_size`)
HOST_MEMORY = 100e9  # bytes/s of host memory traffic, for the optimizers of all ranks together; a guess


@dataclass(frozen=True)
class Held:
    """Bytes of a model's training before they are partitioned.

    Attributes:
        weights: as they compute.
        gradients: of the same type.
        state: float32 copies of weights that train, and the optimizer's state.
    """

    weights: int
    gradients: int
    state: int


def held_by(costed: CostedModel) -> Held:
    """Return what DeepSpeed partitions: with weights in half precision it keeps copies and state in float32."""
    weights = sum(cost.weights for cost in costed.costs)
    gradients = sum(cost.gradients for cost in costed.costs)
    state = sum(cost.optimizer for cost in costed.costs)
    widened = 2 if _is_half(costed, weights) else 1
    return Held(weights, gradients, widened * (gradients + state))


def _is_half(costed: CostedModel, weights: int) -> bool:
    return weights < 3 * costed.structure.parameters  # bytes each


def fullest(costed: CostedModel, devices: Sequence[Device], offload: Offload) -> float:
    """Return the peak of the fullest device as a fraction of its capacity."""
    held, count = held_by(costed), len(devices)
    partitioned = held.gradients + (0 if offload == "all" else held.weights)
    partitioned += held.state if offload == "none" else 0
    without_weights = [replace(cost, weights=0, gradients=0, optimizer=0, step=0) for cost in costed.costs]
    passing = sum(peak_terms([*without_weights, costed.first], costed.schedule).values())
    smallest = min(device.capacity for device in devices)
    largest_block = max((cost.weights for cost in costed.costs), default=0)
    gathered = min(held.weights, max(2 * largest_block, int(LIVE * smallest)))
    step = 0 if offload != "none" else min(STEP, 2 * held.gradients // count)
    peak = partitioned // count + max(passing + gathered, step)
    return max((peak + device.overhead) / device.capacity for device in devices)


def host_bytes(costed: CostedModel, offload: Offload) -> int:
    """Return what all ranks together keep in host memory."""
    held = held_by(costed)
    return (held.state if offload != "none" else 0) + (held.weights if offload == "all" else 0)


def time_of(
    costed: CostedModel, devices: Sequence[Device], offload: Offload, host: HostRates | None = None
) -> StepTime | None:
    """Return the time of a step of all ranks: that of the slowest. None without known rates or a trace."""
    rates = rates_of_all(devices)
    if rates is None or not costed.work.is_complete:
        return None
    host = host or host_of(rates)
    times = [_of_rank(costed, rate, len(devices), offload, host) for rate in rates]
    seconds = max(time.seconds for time in times)
    slowest = next(time for time in times if time.seconds == seconds)
    busy = tuple(time.computing / seconds for time in times)
    return StepTime(seconds, len(devices) * tokens_of(costed.workload), busy, slowest.bound, origin_of(rates))


@dataclass(frozen=True)
class _RankTime:
    """The time of one rank's step in seconds, how long its device computes in it, and what bounds it."""

    seconds: float
    computing: float
    bound: Bound


def _of_rank(costed: CostedModel, rates: DeviceRates, count: int, offload: Offload, host: HostRates) -> _RankTime:
    held = held_by(costed)
    part = (count - 1) / count
    # Seconds a byte, from host memory: each rank fetches its part, all of them from the same memory.
    fetched = max(1 / count / rates.host_bytes, 1 / HOST_MEMORY) if offload == "all" else 0.0
    computing = launching = moving = seconds = 0.0
    for work, cost in zip(costed.work.blocks, costed.costs, strict=True):
        if work is None:
            continue
        gather = cost.weights * part / rates.link_bytes + (host.copy if cost.weights else 0.0)
        fetch = cost.weights * fetched  # not overlapped: nobody has measured how much of it is
        reduce = cost.gradients * part / rates.link_bytes + (host.copy if cost.gradients else 0.0)
        hook = HOOKED * host.hook if cost.weights else 0.0  # DeepSpeed's, which gather, are no cheaper
        for one_pass, sent in ((work.forward, gather), (work.backward, gather + reduce)):
            times = one_pass.seconds(rates), one_pass.launching(host) + hook, sent
            computing, launching, moving = (a + b for a, b in zip((computing, launching, moving), times, strict=True))
            seconds += max(times) + fetch
            moving += fetch
    batches = costed.workload.accumulation
    computing, launching, moving, seconds = (
        batches * seconds_each for seconds_each in (computing, launching, moving, seconds)
    )
    moved = 3 * (held.state + held.gradients) // count
    if offload == "none":
        update = (moved * FOREACH + CLIPPING * held.gradients // count) / rates.memory
        computing += update
    else:  # gradients go to the host, weights come back
        update = FOREACH * moved * count / HOST_MEMORY
        update += (held.gradients + held.weights) / count / rates.host_bytes
        moving += update
    bound: Bound = "devices"
    if max(launching, moving) > computing:
        bound = "host" if launching > moving else "links"
    return _RankTime(seconds + update, computing, bound)
