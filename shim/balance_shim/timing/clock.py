"""Discrete events of a host and its devices: when each operation would start and end.

The host queues operations and goes on; each device works off its streams in order. Nothing sleeps: a time is a number,
the same on every machine. The rules are CUDA's:

* An operation starts when the host has queued it, its stream has come to it, and the device is free.
* A plain copy between devices is a barrier for the current streams of both (ATen/native/cuda/Copy.cu of torch 2.13:
  the destination's stream is waited for before the copy, and waits after it). On streams of its own a copy waits for
  nothing else but the events that the program makes these streams wait for.
* Copies on different streams do not slow each other down. (Operations are queued in the order of the program, which
  is not that in which they run, so who would have a link first is not known when a copy is queued.)
* Reading a value, a copy to the host, and `synchronize` make the host wait.

Autograd runs the backward pass of several devices in a thread each. Here one thread launches everything, so where the
host is the bound, times of several devices are too long.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .rates import Caller, DeviceRates, HostRates, Operation
from .step_time import Bound, Origin, StepTime

BUSY = 0.8  # of a step: what is occupied for longer is the bound
MOST_GAPS = 64  # between operations of a device that are remembered, the latest ones
AT_ONCE = 1.1  # devices that compute on average, above which they are not said to take turns
DEFAULT = 0  # the number of the stream that a device works on unless told otherwise


class Clock:
    """The time of a host and of the streams of its devices, in seconds since it was made.

    Attributes:
        devices: the rates of each.
        host: how far the host has come.
    """

    def __init__(self, devices: Sequence[DeviceRates], host: HostRates | None = None):
        self.devices = tuple(devices)
        self.host_rates = host or HostRates()
        self.host = 0.0
        callers: tuple[Caller, ...] = ("python", "engine", "recomputing")
        self._host_seconds = {
            (bool(launches), caller): self.host_rates.seconds(Operation(launches=launches, caller=caller))
            for launches in (0, 1)
            for caller in callers
        }
        self._streams: list[dict[int, float]] = [{DEFAULT: 0.0} for _ in self.devices]
        self._current = [DEFAULT for _ in self.devices]
        self._free = [0.0 for _ in self.devices]  # when a device has done what was queued to compute
        self._gaps: list[list[tuple[float, float]]] = [[] for _ in self.devices]  # when it has nothing to do
        self._busy = [0.0 for _ in self.devices]
        self._copying = 0.0
        self._launching = 0.0

    # Work.

    def launch(self, device: int, operation: Operation, stream: int | None = None) -> None:
        """Let the host queue `operation` on a device, on its current stream or on `stream`."""
        seconds = self._host_seconds[operation.launches > 0, operation.caller]
        self.host += seconds
        self._launching += seconds
        if operation.launches:
            self._occupy(device, self.devices[device].seconds(operation), self.host, stream)

    def run(self, device: int, seconds: float, launching: float, stream: int | None = None) -> None:
        """Let a device compute for `seconds`, on operations that the host takes `launching` seconds to queue.

        A block of operations at once: the device starts with the first and ends no sooner than the host has queued the
        last.
        """
        began = self.host
        self.host += launching
        self._launching += launching
        self._occupy(device, seconds, began, stream)
        stream = self._current[device] if stream is None else stream
        self._streams[device][stream] = max(self._streams[device][stream], self.host)

    def work(self, seconds: float) -> None:
        """Let the host be occupied with something of its own."""
        self.host += seconds
        self._launching += seconds

    def copy(
        self, source: int, target: int, size: int, source_stream: int | None = None, target_stream: int | None = None
    ) -> None:
        """Copy `size` bytes between devices: a barrier for the two streams, by default the current ones."""
        self.host += self.host_rates.launch
        self._launching += self.host_rates.launch
        sending = self._current[source] if source_stream is None else source_stream
        receiving = self._current[target] if target_stream is None else target_stream
        start = max(
            self.host,
            self._streams[source].get(sending, 0.0),
            self._streams[target].get(receiving, 0.0),
        )
        seconds = self.seconds_to_copy(source, target, size)
        self._streams[source][sending] = self._streams[target][receiving] = start + seconds
        self._copying += seconds

    def from_host(self, target: int, size: int, stream: int | None = None) -> None:
        """Copy `size` bytes from the host; the host goes on."""
        self.host += self.host_rates.launch
        stream = self._current[target] if stream is None else stream
        start = max(self.host, self._streams[target].get(stream, 0.0))
        self._streams[target][stream] = start + self._to_or_from_host(target, size)

    def to_host(self, source: int, size: int, stream: int | None = None) -> None:
        """Copy `size` bytes to the host, which waits for them."""
        self.synchronize(source, stream)
        self.host += self.host_rates.launch + self._to_or_from_host(source, size)
        stream = self._current[source] if stream is None else stream
        self._streams[source][stream] = self.host

    # Streams and events.

    def new_stream(self, device: int) -> int:
        """Return the number of a stream of its own on a device."""
        number = len(self._streams[device])
        self._streams[device][number] = 0.0
        return number

    def current_stream(self, device: int) -> int:
        """Return the stream that operations on the device are queued on."""
        return self._current[device]

    def use_stream(self, device: int, stream: int) -> None:
        """Make `stream` the current one of its device."""
        self._current[device] = stream

    def record(self, device: int, stream: int | None = None) -> float:
        """Return the time of an event that is recorded on a stream now: when all that it holds so far is done."""
        stream = self._current[device] if stream is None else stream
        return max(self.host, self._streams[device].get(stream, 0.0))

    def wait(self, device: int, event: float, stream: int | None = None) -> None:
        """Let a stream wait for an event; the host does not."""
        stream = self._current[device] if stream is None else stream
        self._streams[device][stream] = max(self._streams[device].get(stream, 0.0), event)

    def synchronize(self, device: int | None = None, stream: int | None = None) -> None:
        """Let the host wait: for one stream, for a device, or for all of them."""
        if device is None:
            self.host = self.now
        elif stream is None:
            self.host = max(self.host, *self._streams[device].values())
        else:
            self.host = max(self.host, self._streams[device].get(stream, 0.0))

    def wait_until(self, moment: float) -> None:
        """Let the host wait for an event."""
        self.host = max(self.host, moment)

    # Reading.

    @property
    def now(self) -> float:
        """When the host and all that has been queued are done."""
        return max(self.host, *(time for streams in self._streams for time in streams.values()))

    def reading(self) -> "Reading":
        """Return the times so far; the difference of two readings is the time in between."""
        return Reading(self.now, tuple(self._busy), self._copying, self._launching)

    def seconds_to_copy(self, source: int, target: int, size: int) -> float:
        """Return how long a copy takes: at the rate of the slower link."""
        rate = min(self.devices[source].link_bytes, self.devices[target].link_bytes)
        return self.host_rates.copy + size / rate

    def _to_or_from_host(self, device: int, size: int) -> float:
        return self.host_rates.copy + size / self.devices[device].host_bytes

    def _occupy(self, device: int, seconds: float, queued: float, stream: int | None) -> None:
        streams = self._streams[device]
        if stream is None:
            stream = self._current[device]
        start = self._earliest(device, max(queued, streams.get(stream, 0.0)), seconds)
        streams[stream] = start + seconds
        self._busy[device] += seconds

    def _earliest(self, device: int, ready: float, seconds: float) -> float:
        """Return when the device can do what takes so long and is `ready` then, which it does from there on.

        A stream that waits leaves the device to others: what was queued later may run before.
        """
        free, gaps = self._free[device], self._gaps[device]
        if ready < free:
            for place, (begin, end) in enumerate(gaps):
                start = max(begin, ready)
                if start + seconds <= end:
                    rest = ((begin, start), (start + seconds, end))
                    gaps[place : place + 1] = [gap for gap in rest if gap[0] < gap[1]]
                    return start
            ready = free
        elif ready > free:
            gaps.append((free, ready))
            del gaps[:-MOST_GAPS]
        self._free[device] = ready + seconds
        return ready


class Reading(NamedTuple):
    """Times of a clock, in seconds.

    Attributes:
        now: when everything queued so far is done.
        busy: for each device, how long it has computed.
        copying: how long links between devices were in use.
        launching: how long the host was occupied.
    """

    now: float
    busy: tuple[float, ...]
    copying: float
    launching: float

    def since(self, before: "Reading") -> "Reading":
        """Return the time from `before` to this reading."""
        busy = tuple(after - earlier for after, earlier in zip(self.busy, before.busy, strict=True))
        return Reading(self.now - before.now, busy, self.copying - before.copying, self.launching - before.launching)

    def plus(self, other: "Reading", times: int) -> "Reading":
        """Return this reading plus `times` times `other`."""
        busy = tuple(mine + times * more for mine, more in zip(self.busy, other.busy, strict=True))
        return Reading(
            self.now + times * other.now,
            busy,
            self.copying + times * other.copying,
            self.launching + times * other.launching,
        )

    @property
    def bound(self) -> Bound:
        """The part that took most of the time: see `StepTime.bound`."""
        if not self.now:
            return "devices"
        if max(self.busy, default=0.0) >= BUSY * self.now:
            return "devices"
        if self.launching >= BUSY * self.now:
            return "host"
        if self.copying > sum(self.busy):
            return "links"
        # More than one computes at a time on average: a pipeline that fills and empties.
        return "devices" if sum(self.busy) > AT_ONCE * self.now else "one device at a time"


def step_time(reading: Reading, tokens: int, devices: Sequence[DeviceRates], steps: int = 1) -> StepTime:
    """Return the duration of one step; `reading` covers `steps` of them."""
    busy = tuple(min(1.0, busy / reading.now) if reading.now else 0.0 for busy in reading.busy)
    return StepTime(reading.now / steps, tokens, busy, reading.bound, origin_of(devices))


def origin_of(devices: Sequence[DeviceRates]) -> Origin:
    """Return where the rates of these devices are from."""
    measured = [device.measured for device in devices]
    if all(measured):
        return "measured"
    return "mixed" if any(measured) else "data sheet"
