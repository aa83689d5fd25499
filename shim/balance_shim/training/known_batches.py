"""The micro-batches that were examined: those that fit under the plan in force, in one piece or in portions."""

from dataclasses import replace

from ..placement.calibration import scaled
from ..placement.costed_model import CostedModel
from ..placement.plan import Plan, evaluate
from .batch_shapes import BatchShapes

# A plan holds for batches so many times as long if it fits with activations that have grown by the square of that,
# which nothing in a model exceeds. The first of these that fits counts.
FACTORS = (4.0, 3.0, 2.0, 1.5, 1.25, 1.1)


class KnownBatches:
    """The results for micro-batches of one training. Each decides for all that take no more memory."""

    def __init__(self) -> None:
        self._fitting: list[tuple[BatchShapes, float]] = []  # with the factor by which longer ones fit
        self._split: list[tuple[BatchShapes, int]] = []  # with the number of portions
        self._hopeless: list[BatchShapes] = []

    def fits(self, shapes: BatchShapes) -> bool:
        """Whether a micro-batch is known to fit in one piece."""
        return any(fitting.covers(shapes, factor) for fitting, factor in self._fitting)

    def portions(self, shapes: BatchShapes) -> int:
        """Return the number of portions in which a micro-batch is known to fit; 0: unknown."""
        return next((count for splitting, count in self._split if splitting.covers(shapes)), 0)

    def is_hopeless(self, shapes: BatchShapes) -> bool:
        """Whether a micro-batch takes at least as much as one that fits in no number of portions."""
        return any(shapes.covers(hopeless) for hopeless in self._hopeless)

    def add_fitting(self, shapes: BatchShapes, plan: Plan, costed: CostedModel) -> None:
        """Note that a micro-batch fits, and by which factor longer ones do.

        Args:
            plan: the one in force.
            costed: the costs of a step with the micro-batch.
        """
        devices = [planned.device for planned in plan.devices]

        def fits(factor: float) -> bool:
            costs = tuple(scaled(cost, factor * factor, 1) for cost in costed.costs)
            grown = replace(costed, costs=costs, first=scaled(costed.first, factor * factor, 1))
            return not evaluate(plan.mode, grown, plan.device_map, devices).shortfall

        self._fitting.append((shapes, next(filter(fits, FACTORS), 1.0)))

    def add_split(self, shapes: BatchShapes, count: int) -> None:
        """Note that a micro-batch fits in `count` portions."""
        self._split.append((shapes, count))

    def add_hopeless(self, shapes: BatchShapes) -> None:
        """Note that a micro-batch fits in no number of portions."""
        self._hopeless.append(shapes)
