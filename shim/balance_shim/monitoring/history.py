"""The memory of devices over a whole training, in no more points than a picture needs."""

from collections.abc import Sequence
from typing import NamedTuple

from .readings import Reading

MOST_POINTS = 1000  # a picture is not wider


class Point(NamedTuple):
    """Consecutive steps: the number of the last one, and the highest value of each device in bytes."""

    step: int
    peaks: tuple[int, ...]
    allocated: tuple[int, ...]
    reserved: tuple[int, ...]
    others: tuple[int, ...]


class History:
    """Points in order; neighbours are joined when they become too many.

    Attributes:
        names, totals: the devices, and the bytes that each has.
        points: what was added, each of `stride` steps but for the last.
    """

    def __init__(self, names: Sequence[str], totals: Sequence[int]) -> None:
        self.names, self.totals = tuple(names), tuple(totals)
        self.points: list[Point] = []
        self._stride = 1
        self._in_last = 0

    def add(self, step: int, readings: Sequence[Reading]) -> None:
        before = self.points[-1].others if self.points else (0,) * len(self.names)
        others = [
            old if reading.others is None else reading.others for reading, old in zip(readings, before, strict=True)
        ]
        point = Point(
            step,
            tuple(reading.peak for reading in readings),
            tuple(reading.allocated for reading in readings),
            tuple(reading.reserved for reading in readings),
            tuple(others),
        )
        if self._in_last % self._stride:
            self.points[-1] = _joined(self.points[-1], point)
        else:
            self.points.append(point)
        self._in_last += 1
        if len(self.points) > MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            rest = self.points[-1:] if len(self.points) % 2 else []
            self.points = [*(_joined(*pair) for pair in pairs), *rest]
            self._in_last = self._stride if rest else 0
            self._stride *= 2

    def highest(self, field: str) -> tuple[int, ...]:
        """Return the most of "peaks", "allocated", "reserved" or "others" on each device."""
        return tuple(map(max, zip(*(getattr(point, field) for point in self.points), strict=True)))


def _joined(first: Point, second: Point) -> Point:
    most = [tuple(map(max, one, two)) for one, two in zip(first[1:], second[1:], strict=True)]
    return Point(second.step, *most)
