"""`BALANCE_REBALANCE=1`: move blocks between steps if the first steps differ from the prediction.

The first step is not measured: the optimizer has its state only when it is over.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import devices, log, state
from ..choices import EventKind
from ..device import Device
from ..errors import MoveError
from ..monitoring.batch import BatchSize, size_of
from ..monitoring.readings import Meter
from ..patching.guard import attempt
from ..placement import planner
from ..placement.calibration import corrected
from ..placement.costed_model import CostedModel
from ..placement.plan import Plan, evaluate
from ..placement.request import Request
from ..report import plan_report
from ..training_run import Part
from ..units import counted, format_alike, format_size
from ..upstream.trainer import TrainerLike
from . import chunked_loss, outside, weight_copies
from .actual_workload import actual_workload
from .current_request import request_for
from .held import held_by, state_bytes
from .replan import WORTH_MOVING, costs_in_force, worth_moving

if TYPE_CHECKING:
    from torch import nn

STEPS_BEFORE = 1  # that are not measured
STEPS_MEASURED = 2  # before each decision, at least
MOST_MEASURED = 50  # while all micro-batches are shorter than what was planned for: they tell nothing of that
AS_LONG = 0.9  # of the tokens that were planned for
MOST_MOVES = 2  # the second puts right what the first one got wrong


def begin(trainer: TrainerLike, model: "nn.Module", plan: Plan, moved: Callable[[Plan], None]) -> None:
    """Measure the first steps of `trainer` and move blocks then, if the settings ask for it and that can be done.

    To be called after `trainer_callback.begin`: at the start of a step the monitor reads peaks, which are reset here.

    Args:
        trainer: a `transformers.Trainer` about to train.
        model: what was placed: the trainer's model, or one inside of it.
        plan: the plan in force.
        moved: is told the new plan when blocks have moved.
    """
    if not state.settings().rebalance:
        return
    if not plan.is_ours:
        log.once("info", "BALANCE_REBALANCE=1 applies to maps made by the shim; a given map is not changed")
        return
    if trainer.args.world_size > 1:
        log.once("info", "BALANCE_REBALANCE=1: blocks of replicas do not move while they train")
        return
    kind = devices.accelerator_type()
    if kind is None or len(set(plan.device_map.values())) < 2:
        return
    callback = _callback(rebalancer := Rebalancer(trainer, model, plan, moved, kind))
    trainer.add_callback(callback)
    _REBALANCER.keep(trainer, (rebalancer, callback))


def saw_batch(trainer: TrainerLike, inputs: Any) -> None:
    """Take the inputs of a micro-batch; nothing happens where nothing is measured."""
    entry = _REBALANCER.of(trainer)
    if entry is not None:
        rebalancer, _ = entry
        rebalancer.guarded(rebalancer.batch, inputs)


def replanned(trainer: TrainerLike, plan: Plan) -> None:
    """Take the plan of a map that something else has put in force; earlier measurements do not apply to it."""
    entry = _REBALANCER.of(trainer)
    if entry is not None:
        rebalancer, _ = entry
        rebalancer.guarded(rebalancer.replanned, plan)


class Rebalancer:
    """Watches the first steps of one call of `Trainer.train`, and moves blocks between two of them where that pays.

    Any failure in here ends it with one warning, and the training goes on.
    """

    def __init__(
        self,
        trainer: TrainerLike,
        model: "nn.Module",
        plan: Plan,
        moved: Callable[[Plan], None],
        kind: str,
    ) -> None:
        self._trainer, self._model, self._moved = trainer, model, moved
        self._plan = plan
        self._devices = tuple(device.device for device in plan.devices)
        self._meter = Meter(kind, [device.index for device in self._devices])
        self._moves = 0
        self.running = True
        self._start(STEPS_BEFORE)

    def _start(self, steps_before: int) -> None:
        """Begin to measure anew, when so many more steps are over."""
        self._steps_before, self._steps = steps_before, 0
        self._measured = dict.fromkeys(self._meter.indices, 0)
        self._size = BatchSize()
        self._batch: dict[str, Any] | None = None

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Call `function`, unless this has ended; a failure ends it."""
        if self.running and not attempt("re-balancing", _done, function, args, default=False, instead="no block moves"):
            self.running = False

    def train_begin(self) -> None:
        self._start(STEPS_BEFORE)  # again where the Trainer looks for a batch size by itself
        own_bytes = held_by(self._trainer.model, self._trainer.optimizer)
        readings = self._meter.read(with_others=False)
        # Other models of this process are not the plan's, which has taken their room off.
        self._foreign = {
            index: max(0, reading.allocated - own_bytes.get(index, 0))
            for index, reading in zip(self._meter.indices, readings, strict=True)
        }

    def replanned(self, plan: Plan) -> None:
        """Measure anew, against `plan`, from the step after this one."""
        self._plan = plan
        self._start(STEPS_BEFORE)  # this step has seen both maps

    @property
    def _measuring(self) -> bool:
        return self._steps >= self._steps_before

    def step_begin(self) -> None:
        if self._measuring:
            self._meter.reset_peaks()

    def batch(self, inputs: Any) -> None:
        """Keep the largest micro-batch: the measured peaks are those of its shape."""
        size = size_of(inputs)
        if self._measuring and size.elements > self._size.elements:
            self._size = size
            self._batch = {name: value.cpu() if hasattr(value, "cpu") else value for name, value in inputs.items()}

    def step_end(self, number: int) -> None:
        if self._measuring:
            for index, peak in zip(self._meter.indices, self._meter.peaks(), strict=True):
                self._measured[index] = max(self._measured[index], peak - self._foreign[index])
        self._steps += 1
        measured = self._steps - self._steps_before
        if measured < STEPS_MEASURED or (not self._long_enough() and measured < MOST_MEASURED):
            return
        when = f"steps {number - measured + 1} to {number}"
        moved = self._long_enough() and self._differs() and self._rebalanced(when)
        self._moves += moved
        self._start(0)
        if not moved or self._moves == MOST_MOVES:
            self.running = False

    def _long_enough(self) -> bool:
        """Whether the measured sequences are no shorter than the planned ones, where these are more than a guess.

        Short sequences need other shares of the memory than the long ones that are to come, and no map of theirs.
        """
        planned = self._plan.workload
        return planned.guessed or not self._size.tokens or self._size.tokens >= AS_LONG * planned.tokens

    def _differs(self) -> bool:
        """Whether some device's peak is so far from its prediction that another map could be better by enough."""
        fullest = max(self._measured[device.index] / device.capacity for device in self._devices)
        return any(
            abs(self._measured[device_plan.device.index] - device_plan.predicted_peak)
            >= (1 - WORTH_MOVING) * fullest * device_plan.capacity
            for device_plan in self._plan.devices
        )

    def _rebalanced(self, when: str) -> bool:
        """Plan again with the measured figures; return whether blocks have moved."""
        request, costed, usable = self._corrected(when)
        now = evaluate("balanced", costed, self._plan.device_map, usable)
        better = planner.solved(request, costed, self._plan.recomputed)
        fullest = self._worst_measured()
        if better is None or not worth_moving(now, better) or len(set(better.device_map.values())) == 1:
            self._say(f"measured peaks differ from the plan ({fullest}), but no other map is better by a useful margin")
            return False
        reason = weight_copies.reason_to_stay(self._trainer)
        if reason:
            self._say(f"measured peaks differ from the plan ({fullest}), but {reason}")
            return False
        try:
            moved = outside.move_along(self._trainer, self._model, better.device_map)
        except MoveError as error:
            log.warning(f"a better map was found for what was measured, but {error}; training continues unchanged")
            return False
        self._say(
            f"measured peaks of {when} differ from the plan ({fullest}): moved {counted(len(moved.blocks), 'block')} "
            f"({format_size(moved.size)}, optimizer state included), predicted peak of the fullest device "
            f"{plan_report.worst_devices(better, now)}",
            "move",
        )
        self._plan = better
        self._moved(better)
        return True

    def _corrected(self, when: str) -> tuple[Request, CostedModel, tuple[Device, ...]]:
        """Return the request, costs and devices to plan for: the expected micro-batch, corrected by measurements."""
        planned = self._plan.workload
        measured = planned
        if self._size.tokens:
            measured = replace(planned, batch_size=self._size.batch_size, seq_len=self._size.seq_len, guessed=False)
        if measured.loss == "chunked" and self._batch is not None and not chunked_loss.has_labels(self._batch):
            measured = replace(measured, loss="full")
        request = request_for(self._trainer, self._model, measured, self._batch, self._devices)
        seen_costs = target = self._costs(request)
        if self._size.tokens < planned.tokens and not planned.guessed and self._size.tokens:
            # Slightly longer sequences are known to come: what was measured is carried over to them.
            _, batch = actual_workload(self._trainer, planned)
            request = request.with_case(workload=planned, batch=batch)
            target = self._costs(request)
        target, usable = corrected(target, seen_costs, self._plan.device_map, self._devices, self._measured)
        method = f"{target.method}, corrected by the peaks measured in {when}"
        return replace(request, devices=usable), replace(target, method=method), usable

    def _costs(self, request: Request) -> CostedModel:
        """Return the costs with the layers recomputed that are, and the optimizer state that there is."""
        costed = costs_in_force(request, self._plan.recomputed)
        state_sizes = _optimizer_state(self._trainer.optimizer, self._model, costed)
        costs = tuple(replace(cost, optimizer=size) for cost, size in zip(costed.costs, state_sizes, strict=True))
        return replace(costed, costs=costs, records=(), first_record=None)  # of other costs than these

    def _worst_measured(self) -> str:
        """Return measured and predicted peak of the device that is furthest off."""
        worst = max(
            self._plan.devices,
            key=lambda device_plan: (
                abs(self._measured[device_plan.device.index] - device_plan.predicted_peak) / device_plan.capacity
            ),
        )
        measured, predicted = format_alike(self._measured[worst.device.index], worst.predicted_peak)
        return f"{worst.name} {measured}, predicted {predicted}"

    def _say(self, text: str, kind: EventKind = "message") -> None:
        if state.settings().report != "off":
            log.info(text, kind)


def _optimizer_state(optimizer: Any, model: "nn.Module", costed: CostedModel) -> list[int]:
    """Return the bytes of state on the device that each block's parameters have; tied ones count with the last."""
    states = getattr(optimizer, "state", {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes: list[int] = []
    counted_ids: set[int] = set()
    for block in reversed(costed.blocks):
        own = {id(parameters[name]): parameters[name] for name in block.parameters if name in parameters}
        sizes.append(sum(state_bytes(states, parameter) for key, parameter in own.items() if key not in counted_ids))
        counted_ids |= own.keys()
    return sizes[::-1]


def _done(function: Callable[..., None], args: tuple[Any, ...]) -> bool:
    function(*args)
    return True


def _callback(rebalancer: Rebalancer) -> Any:
    from transformers import TrainerCallback

    class Rebalancing(TrainerCallback):
        """Keeps no state in checkpoints, and changes no control flow."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            rebalancer.guarded(rebalancer.train_begin)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            rebalancer.guarded(rebalancer.step_begin)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rebalancer.guarded(rebalancer.step_end, state.global_step)

    return Rebalancing()


def _end(trainer: TrainerLike, entry: tuple[Rebalancer, Any]) -> None:
    trainer.remove_callback(entry[1])


_REBALANCER: Part[tuple[Rebalancer, Any]] = Part("re-balancing", _end, instead="its callback stays")
