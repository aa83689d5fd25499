"""Tell a steady rise from a jump and from noise, by pure arithmetic on a stream of numbers."""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

# Rises are looked for over so many values a part, so that fast leaks are found soon and slow ones at all.
LENGTHS = (2, 8, 32, 128)
PARTS = 5
LEAST_SHARE = 0.125  # of an even share of the rise that each part must have: one jump is no rise


class SteadyRise:
    """Looks for a rise in the lower envelope of a series, over `PARTS` parts of `length` values each.

    `noise` is what may come and go with each value for a known reason (the batch that is still held); a rise must be
    larger than twice the range that it has gone through.
    """

    def __init__(self, length: int, least: float) -> None:
        self._length, self._least = length, least
        self._parts: deque[tuple[float, float, float]] = deque(maxlen=PARTS)  # lowest value, least and most noise
        self._values: list[tuple[float, float]] = []

    def add(self, value: float, noise: float = 0) -> float | None:
        """Take the next value; return the rise from one value to the next, on average, if there is one now."""
        self._values.append((value, noise))
        if len(self._values) < self._length:
            return None
        lowest = min(earlier for earlier, _ in self._values)
        noises = [earlier_noise for _, earlier_noise in self._values]
        self._parts.append((lowest, min(noises), max(noises)))
        self._values.clear()
        return self._rate() if len(self._parts) == PARTS else None

    def _rate(self) -> float | None:
        levels = [part[0] for part in self._parts]
        rise = levels[-1] - levels[0]
        noise = max(part[2] for part in self._parts) - min(part[1] for part in self._parts)
        least_share = LEAST_SHARE * rise / (PARTS - 1)
        pairs = list(pairwise(levels))
        if rise < self._least or rise <= 2 * noise or any(after - before < least_share for before, after in pairs):
            return None
        return rise / ((PARTS - 1) * self._length)


class SteadyRises:
    """`SteadyRise` at several lengths at once."""

    def __init__(self, least: float, lengths: Sequence[int] = LENGTHS) -> None:
        self._rises = [SteadyRise(length, least) for length in lengths]

    def add(self, value: float, noise: float = 0) -> float | None:
        """As in `SteadyRise`; the shortest length that shows a rise counts."""
        rates = [rise.add(value, noise) for rise in self._rises]
        return next((rate for rate in rates if rate is not None), None)


def began(values: Sequence[float]) -> int:
    """Return the position of the first value of the rise that `values` end with.

    Fits a level followed by a straight rise, by least squares, to the lower envelope; O(n^2), so for some hundreds.
    """
    envelope = list(values)
    for position in range(len(envelope) - 2, -1, -1):
        envelope[position] = min(envelope[position], envelope[position + 1])
    best, error = 0, float("inf")
    for start in range(len(envelope) - 1):
        level = sum(envelope[: start + 1]) / (start + 1)
        tail = envelope[start:]
        weight = sum(step * step for step in range(len(tail)))
        slope = sum(step * (value - level) for step, value in enumerate(tail)) / weight
        residual = sum((value - level) ** 2 for value in envelope[:start])
        residual += sum((value - level - slope * step) ** 2 for step, value in enumerate(tail))
        if residual < error * (1 - 1e-9):
            best, error = start, residual
    return best + 1 if best else 0  # what was there before the first value is unknown
