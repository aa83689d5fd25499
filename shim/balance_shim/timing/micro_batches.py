"""The time of a step under a device map: its micro-batches go through the blocks, by the clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .clock import Clock, Reading
from .rates import DeviceRates, HostRates, Operation
from .work import INPUTS, PREVIOUS, BlockWork, Pass

HOOKED = 10  # modules of a layer with parameters of their own, and the layer: each has a hook of accelerate's


@dataclass(frozen=True)
class PlacedBlock:
    """A block on a device.

    Attributes:
        device: its place among the devices of the clock.
    """

    name: str
    work: BlockWork
    device: int


@dataclass(frozen=True)
class Step:
    """One step of an optimizer.

    Attributes:
        blocks: in the order in which they run.
        first: what is computed where inputs arrive, on device 0.
        updates: for each device what its part of the optimizer's step takes.
        micro_batches: how many accumulate.
        in_flight: how many of them go forward before the first goes backward, with copies at the boundaries of devices
            only, and losses that stay where they are; 0: one after the other, with accelerate's copies at each block.
    """

    blocks: tuple[PlacedBlock, ...]
    first: BlockWork
    updates: tuple[Operation, ...]
    micro_batches: int = 1
    in_flight: int = 0


def time_of(step: Step, devices: Sequence[DeviceRates], host: HostRates | None = None) -> Reading:
    """Return the time of a step, from an idle machine until all devices are done.

    Micro-batches, or windows of them, follow one another in the same way: two are run, and stand for the others.
    """
    size = step.in_flight or 1
    windows, rest = divmod(step.micro_batches, size)
    if windows > 3:
        once, twice = (_simulated(replace(step, micro_batches=count * size + rest), devices, host) for count in (1, 2))
        return once.plus(twice.since(once), windows - 1)
    return _simulated(step, devices, host)


def _simulated(step: Step, devices: Sequence[DeviceRates], host: HostRates | None) -> Reading:
    run = _Run(step, Clock(devices, host))
    if step.in_flight:
        for began in range(0, step.micro_batches, step.in_flight):
            window = range(began, min(step.micro_batches, began + step.in_flight))
            for _ in window:
                run.forward()
            for _ in window:
                run.backward()
    else:
        for _ in range(step.micro_batches):
            run.forward()
            run.backward()
    for device, update in enumerate(step.updates):
        if update.moved:
            run.clock.launch(device, update)
    return run.clock.reading()


@dataclass
class _Run:
    """The passes of a step on a clock."""

    step: Step
    clock: Clock
    _streams: dict[tuple[int, int, str], int] = field(default_factory=dict)
    _times: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._home = {block.name: block.device for block in self.step.blocks}
        self._home[INPUTS] = 0
        self._spans = len(set(self._home.values())) > 1

    def forward(self) -> None:
        """Take one micro-batch through all blocks."""
        first = self.step.first
        brought: set[tuple[str, int]] = set()  # what has been brought to a device in this pass
        self._compute(0, first.forward)
        before = 0
        for block in self.step.blocks:
            self._hook()
            self._bring(block, before, brought, again=False)
            self._compute(block.device, block.work.forward)
            before = block.device
        if not self.step.in_flight:
            for transfer in first.transfers:
                self._copy(self._home.get(transfer.source, before), 0, transfer.forward)

    def backward(self) -> None:
        """Take the gradients of one micro-batch back through all blocks."""
        first, blocks = self.step.first, self.step.blocks
        brought: set[tuple[str, int]] = set()
        last = blocks[-1].device if blocks else 0
        if not self.step.in_flight:
            for transfer in first.transfers:
                self._copy(0, self._home.get(transfer.source, last), transfer.returned)
        for position in reversed(range(len(blocks))):
            block = blocks[position]
            before = blocks[position - 1].device if position else 0
            if not self.step.in_flight:  # the transfers of stages keep what was brought
                self._bring(block, before, brought, again=True)
                if block.work.backward.recomputes:
                    self._hook()
            self._compute(block.device, block.work.backward)
            for transfer in block.work.transfers:
                shared = transfer.source != PREVIOUS
                if self.step.in_flight and shared and (transfer.source, -1 - block.device) in brought:
                    continue
                brought.add((transfer.source, -1 - block.device))
                self._copy(block.device, self._source(transfer.source, before), transfer.returned)
        self._compute(0, first.backward)

    def _bring(self, block: PlacedBlock, before: int, brought: set[tuple[str, int]], again: bool) -> None:
        """Copy the inputs of `block` to its device. Shared inputs cross once where micro-batches are in flight."""
        for transfer in block.work.transfers:
            shared = transfer.source != PREVIOUS
            if self.step.in_flight and shared and (transfer.source, block.device) in brought:
                continue
            brought.add((transfer.source, block.device))
            copies = transfer.again if again else transfer.forward
            self._copy(self._source(transfer.source, before), block.device, copies)

    def _source(self, name: str, before: int) -> int:
        return before if name == PREVIOUS else self._home.get(name, before)

    def _copy(self, source: int, target: int, copies: tuple[int, int]) -> None:
        count, size = copies
        if source == target or not count:
            return
        clock = self.clock
        if not self.step.in_flight:
            for _ in range(count):
                clock.copy(source, target, size // count)
            return
        out, into = self._stream(source, source, target), self._stream(target, source, target)
        clock.wait(source, clock.record(source), out)
        clock.copy(source, target, size, out, into)
        clock.wait(target, clock.record(target, into))

    def _stream(self, device: int, source: int, target: int) -> int:
        """Return the copy stream of a device for one direction."""
        key = source, target, "out" if device == source else "in"
        if key not in self._streams:
            self._streams[key] = self.clock.new_stream(device)
        return self._streams[key]

    def _hook(self) -> None:
        if self._spans and not self.step.in_flight:
            self.clock.work(HOOKED * self.clock.host_rates.hook)

    def _compute(self, device: int, work: Pass) -> None:
        if not work.operations:
            return
        key = id(work), device  # the step keeps it alive
        times = self._times.get(key)
        if times is None:
            rates, host = self.clock.devices[device], self.clock.host_rates
            times = self._times[key] = work.seconds(rates), work.launching(host)
        self.clock.run(device, *times)
