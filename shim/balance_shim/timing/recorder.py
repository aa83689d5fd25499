"""Count what virtual devices compute and copy, in the two passes of a training step."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import operations
from .rates import Operation
from .work import BlockWork, Pass, Transfer


class Recorder:
    """A `virtual.machine.Watcher` that counts the work of each device.

    Attributes:
        backward: whether the backward pass is under way; to be set when it begins.
    """

    def __init__(self) -> None:
        self.backward = False
        self._operations: dict[tuple[int, bool], Counter[Operation]] = {}
        self._copies: dict[tuple[int, int, bool], list[int]] = {}  # source, target, pass -> copies, bytes

    def ran(
        self, func: torch._ops.OpOverload, args: Sequence[Any], out: Any, place: int | None, virtual: Sequence[Any]
    ) -> None:
        """Count an operation, or a copy between devices."""
        if operations.rule_of(func).copies:
            source, target = operations.crossing(func, args, place, virtual)
            if source != target:
                if source is not None and target is not None:
                    copies = self._copies.setdefault((source, target, self.backward), [0, 0])
                    copies[0] += 1
                    copies[1] += operations.size_of(out)
                return
        device = place if place is not None else virtual[0].place if virtual else None
        if device is not None:
            self._count(device, operations.cost_of(func, args, out))

    def attended(self, place: int, query: Any, key: Any, value: Any, mask: Any, backward: bool) -> None:
        """Count a fused attention kernel."""
        self._count(place, operations.attention_cost(query, key, value, mask, backward))

    def work_of(self, device: int) -> "DeviceWork":
        """Return what a device has computed, and what it took from others."""
        transfers: dict[int, dict[str, tuple[int, int]]] = {}
        sources = {source for source, target, backward in self._copies if target == device and not backward}
        for source in sources:
            entry = transfers[source] = {"forward": self._copied(source, device, False)}
            # In the backward pass copies of gradients go the other way. Only a recomputed layer takes its inputs again;
            # where gradients come this way, too, they are taken for those of the block that is behind.
            if (device, source, False) not in self._copies:
                entry["again"] = self._copied(source, device, True)
            entry["returned"] = self._copied(device, source, True)
        return DeviceWork(self._pass(device, False), self._pass(device, True), transfers)

    def _count(self, device: int, operation: Operation) -> None:
        key = device, self.backward
        counter = self._operations.get(key)
        if counter is None:
            counter = self._operations[key] = Counter()
        counter[operation] += 1

    def _copied(self, source: int, target: int, backward: bool) -> tuple[int, int]:
        count, size = self._copies.get((source, target, backward), (0, 0))
        return count, size

    def _pass(self, device: int, backward: bool) -> Pass:
        return Pass(tuple(sorted(self._operations.get((device, backward), Counter()).items())))


class DeviceWork:
    """The work of one device of a trace, with the numbers of the devices that it takes something from."""

    def __init__(self, forward: Pass, backward: Pass, transfers: Mapping[int, Mapping[str, tuple[int, int]]]):
        self.forward, self.backward, self._transfers = forward, backward, transfers

    def of_block(self, name_of: Callable[[int], str]) -> BlockWork:
        """Return the work of the block on this device; `name_of` names the block on another one."""
        transfers = tuple(Transfer(name_of(source), **self._transfers[source]) for source in sorted(self._transfers))
        return BlockWork(self.forward, self.backward, transfers)
