"""Streams and events of simulated devices.

Work is done when the call returns, so there is nothing to wait for but time: with a clock, streams and events tell when
operations would run on a device.
"""

import types
from typing import Any

from torch.types import Device

from ..timing.clock import DEFAULT, Clock
from ..virtual.machine import Machine


def make_classes(machine: Machine, clock: Clock | None) -> types.SimpleNamespace:
    """Return the stream functions of a device module: `Stream`, `Event`, `stream`, `current_stream` and the others."""

    class Stream:
        """A stream of one device; `Stream()` makes a new one on the current device."""

        def __init__(self, device: Device = None, priority: int = 0, stream_id: int | None = None, **_: Any):
            index = machine.index_of(device)
            self.device = machine.devices[index]
            self.device_index = index
            if stream_id is None:
                stream_id = DEFAULT if clock is None else clock.new_stream(index)
            self.stream_id = self.npu_stream = self.cuda_stream = stream_id

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and (self.device, self.stream_id) == (other.device, other.stream_id)

        def __hash__(self) -> int:
            return hash((self.device, self.stream_id))

        def synchronize(self) -> None:
            """Let the host wait for the operations queued here."""
            if clock is not None:
                clock.synchronize(self.device_index, self.stream_id)

        def wait_stream(self, stream: "Stream") -> None:
            """Let later operations here wait for those queued on `stream`."""
            self.wait_event(stream.record_event())

        def wait_event(self, event: "Event") -> None:
            """Let later operations here wait for `event`."""
            if clock is not None:
                clock.wait(self.device_index, event.time, self.stream_id)

        def query(self) -> bool:
            return True

        def record_event(self, event: "Event | None" = None) -> "Event":
            """Return `event`, or a new one, for when all that is queued here is done."""
            event = event or Event()
            event.record(self)
            return event

        def __enter__(self) -> "Stream":
            self._context = stream(self)
            self._context.__enter__()
            return self

        def __exit__(self, *_: object) -> None:
            self._context.__exit__()

    class Event:
        """Always complete; its time is that of the clock."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
            self.time = 0.0

        def record(self, stream: Stream | None = None) -> None:
            if clock is not None:
                on = stream or current_stream()
                self.time = clock.record(on.device_index, on.stream_id)

        def wait(self, stream: Stream | None = None) -> None:
            (stream or current_stream()).wait_event(self)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            if clock is not None:
                clock.wait_until(self.time)

        def elapsed_time(self, end_event: "Event") -> float:
            """Return milliseconds from this event to `end_event`; 0 without a clock."""
            return (end_event.time - self.time) * 1e3

    class stream:  # named as in every torch device module
        """Make a stream, and its device, the current one for the length of a `with` block."""

        def __init__(self, stream: Stream | None):
            self.stream = stream

        def __enter__(self) -> Stream | None:
            if self.stream is not None:
                self.before = current_stream(self.stream.device), machine.current
                set_stream(self.stream)
            return self.stream

        def __exit__(self, *_: object) -> None:
            if self.stream is not None:
                set_stream(self.before[0])
                machine.current = self.before[1]

    def current_stream(device: Device = None) -> Stream:
        index = machine.index_of(device)
        return Stream(machine.devices[index], stream_id=DEFAULT if clock is None else clock.current_stream(index))

    def default_stream(device: Device = None) -> Stream:
        return Stream(machine.devices[machine.index_of(device)], stream_id=DEFAULT)

    def set_stream(stream: Stream) -> None:
        machine.current = stream.device_index
        if clock is not None:
            clock.use_stream(stream.device_index, stream.stream_id)

    def synchronize(device: Device = None) -> None:
        """Let the host wait for all work on a device."""
        if clock is not None:
            clock.synchronize(machine.index_of(device))

    return types.SimpleNamespace(
        Stream=Stream, Event=Event, stream=stream, current_stream=current_stream, default_stream=default_stream,
        set_stream=set_stream, synchronize=synchronize,
    )  # fmt: skip
