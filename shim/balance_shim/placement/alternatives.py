"""Every way to train a model on the devices of a request, with what it would take: the candidates of mode `auto`.

Maps are solved here without dry runs: the one that is chosen is verified as any map is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..device import Device
from ..language.message import Message
from ..map_file import DeviceMap
from ..memory.recomputation import is_supported
from ..replicas.shares import Share, divide
from ..timing.step_time import StepTime
from ..units import format_size
from . import zero_prediction
from .balance import DoesNotFit, balance
from .candidates import Candidate, Choice, choose
from .costed_model import CostedModel
from .plan import Plan, evaluate
from .planner import cost
from .remedies import what_would_fit
from .replica_plans import of_shares
from .request import Request
from .step_time import rates_of_all
from .zero_prediction import Offload

MOST_DEVICES = 64  # of a machine
MOST_IN_FLIGHT = 16  # micro-batches; more hardly gain anything and keep more activations


@dataclass(frozen=True)
class Limits:
    """What this process cannot do, each with the reason; "" for what it can.

    Attributes:
        replicas: becoming several ranks with a map each.
        zero3: becoming ranks of ZeRO-3.
        pipeline: several micro-batches in flight.
        in_flight: how many micro-batches the user wants in flight; None: as many as are fastest.
        host_memory: bytes; None: unknown, so that offloading is taken to fit.
        may_recompute: whether checkpointing is ours to switch on.
    """

    replicas: str = ""
    zero3: str = ""
    pipeline: str = "BALANCE_PIPELINE is off"
    in_flight: int | None = None
    host_memory: int | None = None
    may_recompute: bool = True


Shares = Callable[[int], Sequence[Share]]


def choice_for(request: Request, limits: Limits, shares_of: Shares | None = None) -> Choice:
    """Return what to do with the model of `request`.

    Args:
        shares_of: number of ranks -> their shares; None: an even division of the request's devices.
    """
    request = request.in_training().with_workload(in_flight=1, shares_inputs=False)
    alternatives = Alternatives(request, limits, shares_of or _divided(request))
    choice = choose(alternatives.all())
    return choice if choice.chosen is not None else replace(choice, change=alternatives.smallest_change())


def _divided(request: Request) -> Shares:
    sizes = {device.index: device.available for device in request.devices}
    return lambda count: divide(sizes, count)


@dataclass(frozen=True)
class Alternatives:
    """The candidates for one request."""

    request: Request
    limits: Limits
    shares_of: Shares
    _costs: dict[Any, CostedModel] = field(default_factory=dict, compare=False, repr=False)

    def all(self) -> list[Candidate]:
        """Return all candidates, possible or not."""
        candidates: list[Candidate | None] = [self.one_device()]
        if len(self.request.devices) > 1:
            candidates += [self.balanced(), self.checkpointing(), self.pipeline(), self.replicas()]
            candidates.append(self.zero3(("none",)))
        candidates.append(self.zero3(("optimizer", "all")))
        return [candidate for candidate in candidates if candidate is not None]

    def one_device(self) -> Candidate:
        """The fastest device that holds the whole model, else the one with the most room."""
        return self._plain_or_recomputed(lambda request: self._on_one(request))

    def balanced(self) -> Candidate:
        """A balanced map, with what the user has set."""
        return self._map(self.request)

    def checkpointing(self) -> Candidate | None:
        """A balanced map whose layers are recomputed."""
        request = self._recomputed()
        return None if request is None else replace(self._map(request), remedy="checkpointing", recomputes=True)

    def pipeline(self) -> Candidate:
        """A balanced map with the fastest number of micro-batches in flight; recomputing leaves room for more."""
        plain, request = self._in_flight(self.request), self._recomputed()
        if request is None:
            return plain
        recomputed = replace(self._in_flight(request), recomputes=True)
        is_better = recomputed.fits and (not plain.fits or _faster(recomputed.step_time, plain.step_time))
        return recomputed if is_better else plain

    def _in_flight(self, request: Request) -> Candidate:
        best = Candidate("pipeline", impossible=self.limits.pipeline)
        most = request.workload.accumulation
        if most < 2:
            return replace(best, impossible=best.impossible or Message("there is one micro-batch in a step"))
        costed = self._cost(request)
        for count in self._counts_in_flight(most):
            plan = _solved(costed.with_flights(count, shares_inputs=True), request.devices)
            if plan is None:
                break
            candidate = _of_plan("pipeline", plan, request.with_workload(in_flight=count, shares_inputs=True))
            candidate = replace(candidate, count=count, impossible=best.impossible)
            if not best.fits or (candidate.fits and _faster(candidate.step_time, best.step_time)):
                best = candidate
            if not candidate.fits:
                break
        return best

    def _counts_in_flight(self, micro_batches: int) -> list[int]:
        """Return how many micro-batches may be in flight: those that divide a step into nearly equal chunks."""
        requested = self.limits.in_flight
        counts = (
            range(2, min(micro_batches, MOST_IN_FLIGHT) + 1) if requested is None else [min(requested, micro_batches)]
        )
        return sorted({-(-micro_batches // -(-micro_batches // count)) for count in counts})

    def replicas(self) -> Candidate:
        """The most replicas that fit, each with a balanced map on its share."""
        candidate = self._plain_or_recomputed(self._most_replicas)
        return replace(candidate, impossible=self.limits.replicas or candidate.impossible)

    def zero3(self, offloads: Sequence[Offload]) -> Candidate:
        """ZeRO-3 on all devices, with the first of `offloads` that fits."""
        candidate = self._plain_or_recomputed(lambda request: self._partitioned(request, offloads))
        return replace(candidate, impossible=candidate.impossible or self.limits.zero3)

    def smallest_change(self) -> str:
        """Return the mildest change under which a balanced map fits; "" if none is known."""
        plan = _solved(self._cost(self.request), self.request.devices)
        changes = [] if plan is None else what_would_fit(plan, self.request)
        return changes[0] if changes else self._more_devices()

    def _more_devices(self) -> str:
        """Return how many devices like the largest would do; "" if `MOST_DEVICES` would not."""
        request = self._recomputed() or self.request
        costed, largest = self._cost(request), max(request.devices, key=lambda device: device.capacity)

        def fits(count: int) -> bool:
            devices = tuple(replace(largest, index=index) for index in range(count))
            plan = _solved(costed, devices)
            return plan is not None and not plan.shortfall

        low, high = len(request.devices), MOST_DEVICES
        if not fits(high):
            return ""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        needed = Message("{number} devices of {size}", number=high, size=format_size(largest.available))
        return needed if request is self.request else Message("{change}, with gradient checkpointing", change=needed)

    def _cost(self, request: Request) -> CostedModel:
        """Return the costs of the model; they are the same for devices of one architecture, whatever their number."""
        key = request.workload, request.architectures
        if key not in self._costs:
            self._costs[key] = cost(request)
        return self._costs[key]

    def _recomputed(self) -> Request | None:
        """Return the request with all layers recomputed; None where that is so already, or is not ours to decide."""
        if self.request.workload.gradient_checkpointing or self.request.selective or not self.limits.may_recompute:
            return None
        if not is_supported(self.request.model):
            return None
        return self.request.with_workload(gradient_checkpointing=True)

    def _plain_or_recomputed(self, made: Callable[[Request], Candidate]) -> Candidate:
        """Return the candidate as the user has set it; with layers recomputed where only then it fits, or is faster."""
        plain, request = made(self.request), self._recomputed()
        if request is None or (plain.fits and plain.count in (1, len(self.request.devices))):
            return plain
        recomputed = replace(made(request), recomputes=True)
        if not plain.fits:
            return recomputed if recomputed.fits or plain.worst_fill is None else _emptier(plain, recomputed)
        is_better = recomputed.fits and _faster(recomputed.step_time, plain.step_time)
        return recomputed if is_better else plain

    def _map(self, request: Request) -> Candidate:
        plan = _solved(self._cost(request), request.devices)
        return Candidate("balanced", request=request) if plan is None else _of_plan("balanced", plan, request)

    def _on_one(self, request: Request) -> Candidate:
        best = Candidate("one_device", request=request)
        for device in request.devices:
            alone = replace(request, devices=(device,))
            costed = self._cost(alone)  # of this device's kernels, whichever the others need
            whole: DeviceMap = {block.name: device.index for block in costed.blocks}
            candidate = _of_plan("one_device", evaluate("balanced", costed, whole, alone.devices), alone)
            if best.worst_fill is None or _beats(candidate, best):
                best = candidate
        return replace(best, step_time=_spread(best, request.devices))

    def _most_replicas(self, request: Request) -> Candidate:
        best = Candidate("replicas", 2, request=request)
        counts = [count for count in range(len(request.devices), 1, -1) if of_shares(request, self.shares_of(count))]
        for count in counts:
            best = self._replicas_of(request, count) or best
            if best.fits:
                break
        return best if counts else replace(best, impossible=Message("ranks would use devices that are left out here"))

    def _replicas_of(self, request: Request, count: int) -> Candidate | None:
        """Return so many replicas; None where not even the weights of one fit its share."""
        shares = self.shares_of(count)
        requests = of_shares(request, shares)
        plans = [
            plan
            for share_request in requests
            for plan in [_solved(self._cost(share_request), share_request.devices)]
            if plan is not None
        ]
        if not plans or len(plans) < len(requests):
            return None
        return Candidate(
            "replicas",
            count,
            fits=not any(plan.shortfall for plan in plans),
            worst_fill=max(plan.worst.filled for plan in plans),
            step_time=_of_replicas(plans, self._cost(requests[0]), shares, request.devices),
            request=request,
        )

    def _partitioned(self, request: Request, offloads: Sequence[Offload]) -> Candidate:
        costed, devices = self._cost(request), request.devices
        remedy, last = "zero3" if offloads == ("none",) else "zero3_offload", offloads[-1]
        for offload in offloads:
            fill = zero_prediction.fullest(costed, devices, offload)
            room = self.limits.host_memory
            fits_host = room is None or zero_prediction.host_bytes(costed, offload) <= room
            if (fill <= 1 and fits_host) or offload == last:
                return Candidate(
                    remedy,  # type: ignore[arg-type]  # one of two names
                    len(devices),
                    offload=offload,
                    fits=fill <= 1 and fits_host,
                    worst_fill=fill,
                    step_time=zero_prediction.time_of(costed, devices, offload),
                    request=request,
                )
        raise AssertionError("there is a last one")


def _solved(costed: CostedModel, devices: Sequence[Device]) -> Plan | None:
    """Return the balanced plan without dry runs; None where not even the weights fit."""
    try:
        return evaluate("balanced", costed, balance(costed, devices), devices)
    except DoesNotFit:
        return None


def _of_plan(remedy: str, plan: Plan, request: Request) -> Candidate:
    return Candidate(
        remedy,  # type: ignore[arg-type]  # callers name one
        fits=not plan.shortfall,
        worst_fill=plan.worst.filled,
        step_time=plan.step_time,
        plan=plan,
        request=request,
    )


def _spread(candidate: Candidate, devices: Sequence[Device]) -> StepTime | None:
    """Return the step time with the busy share of all devices, of which all but one are idle."""
    time, plan = candidate.step_time, candidate.plan
    if time is None or plan is None:
        return None
    first_index = plan.devices[0].device.index
    return replace(time, busy=tuple(time.busy[0] if device.index == first_index else 0.0 for device in devices))


def _of_replicas(
    plans: Sequence[Plan], costed: CostedModel, shares: Sequence[Share], devices: Sequence[Device]
) -> StepTime | None:
    """Return the time of a step: that of the slowest replica, and what DDP's sums take beyond the backward pass.

    Args:
        plans: of each kind of share, the one with the least memory first.
    """
    rates = rates_of_all(devices)
    times = [plan.step_time for plan in plans if plan.step_time is not None]
    if rates is None or len(times) < len(plans):
        return None
    slowest = max(times, key=lambda time: time.seconds)
    count = len(shares)
    of_each_device = sum(block.gradients for block in costed.costs) / len(plans[0].devices)
    summing = 2 * (count - 1) / count * of_each_device / min(rate.link_bytes for rate in rates)
    backward = slowest.seconds / costed.workload.accumulation / 2  # of the last micro-batch, behind which it hides
    seconds = slowest.seconds + max(0.0, summing - backward)
    by_size = {len(plan.devices): plan for plan in reversed(plans)}
    busy = dict.fromkeys((device.index for device in devices), 0.0)
    for share in shares:
        plan = by_size.get(len(share), plans[0])
        if plan.step_time is not None:
            for index, part in zip(share, plan.step_time.busy, strict=False):
                busy[index] = part * plan.step_time.seconds / seconds
    return replace(slowest, seconds=seconds, tokens=count * slowest.tokens, busy=tuple(busy.values()))


def _faster(one: StepTime | None, other: StepTime | None) -> bool:
    if one is None or other is None:
        return False
    return one.tokens_per_second > other.tokens_per_second


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether a device is a better place for the whole model than another one."""
    if one.fits != other.fits:
        return one.fits
    if one.fits and one.step_time is not None and other.step_time is not None:
        return _faster(one.step_time, other.step_time)
    return (one.worst_fill or 0) < (other.worst_fill or 0)


def _emptier(one: Candidate, other: Candidate) -> Candidate:
    return other if other.worst_fill is not None and other.worst_fill < (one.worst_fill or 0) else one
