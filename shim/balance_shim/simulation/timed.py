"""The clock of simulated devices: every operation that they are given advances it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..timing import operations
from ..timing.clock import Clock, Reading, step_time
from ..timing.step_time import StepTime


class Timed:
    """A `virtual.machine.Watcher` that drives a clock, and remembers when each step of an optimizer ended.

    Attributes:
        clock: in seconds since the devices were made.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self._ends: list[Reading] = []

    def ran(
        self, func: torch._ops.OpOverload, args: Sequence[Any], out: Any, place: int | None, virtual: Sequence[Any]
    ) -> None:
        """Advance the clock by an operation."""
        clock = self.clock
        rule = operations.rule_of(func)
        if rule.copies:
            source, target = operations.crossing(func, args, place, virtual)
            if source != target:
                size = operations.size_of(out)
                if source is None:
                    clock.from_host(target, size)  # type: ignore[arg-type]  # one of the two is a device
                elif target is None:
                    clock.to_host(source, size)
                else:
                    clock.copy(source, target, size)
                return
        device = place if place is not None else virtual[0].place if virtual else None
        if device is None:
            return
        clock.launch(device, operations.cost_of(func, args, out))
        if (rule.is_awaited or rule.by_mask) and operations.waits(func, args):
            clock.synchronize(device, clock.current_stream(device))

    def attended(self, place: int, query: Any, key: Any, value: Any, mask: Any, backward: bool) -> None:
        """Advance the clock by a fused attention kernel."""
        self.clock.launch(place, operations.attention_cost(query, key, value, mask, backward))

    def count_hooks(self, module: Any) -> None:
        """Have the host take its time for accelerate's hooks around modules; `module` is `accelerate.hooks`."""
        hook = module.AlignDevicesHook
        pre_forward, seconds = hook.pre_forward, self.clock.host_rates.hook

        def timed_pre_forward(hook: Any, *args: Any, **kwargs: Any) -> Any:
            self.clock.work(seconds)
            return pre_forward(hook, *args, **kwargs)

        hook.pre_forward = timed_pre_forward

    # Steps.

    def begin(self, *_: Any) -> None:
        """Start again with steps: an optimizer has been made."""
        self._ends = [self.clock.reading()]

    def end_step(self, *_: Any) -> None:
        """Remember that an optimizer has made a step."""
        self._ends.append(self.clock.reading())

    def of_a_step(self) -> StepTime | None:
        """Return the time of a step, the mean of all but the first where there are several; None without a step.

        The first one begins when the optimizer is made, so it may include what a script does before it trains.
        """
        ends = self._ends[1:] if len(self._ends) > 2 else self._ends
        if len(ends) < 2:
            return None
        return step_time(ends[-1].since(ends[0]), 0, self.clock.devices, steps=len(ends) - 1)


def watch_optimizers(timed: Timed) -> None:
    """Have every optimizer of this process tell when it is made and when it has made a step."""
    from torch.optim import optimizer

    optimizer.register_optimizer_step_post_hook(timed.end_step)
    make = optimizer.Optimizer.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        timed.begin()

    optimizer.Optimizer.__init__ = __init__  # type: ignore[method-assign]
