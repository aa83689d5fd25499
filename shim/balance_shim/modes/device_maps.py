"""The base of the modes `balanced`, `map` and `auto`: one process trains a model that spans several devices."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from .. import devices, log, state, training_run
from ..monitoring import trainer_callback
from ..patching.guard import attempt, insist
from ..pipeline import window
from ..pipeline.forward_only import not_waiting
from ..placement import placed_models
from ..placement.model_load import Call, calls
from ..placement.plan import Plan
from ..replicas import ranks
from ..report import plan_report
from ..rng import undisturbed
from ..training import (
    batch_check,
    changed_modules,
    checkpointing,
    data_parallel,
    evaluation_check,
    outputs,
    outside,
    portions,
    precision,
    rebalance,
    repair,
    replaced_model,
    wrapped_model,
)
from ..training.actual_workload import innermost
from ..training.chunked_loss import step_context
from ..training.replan import second_pass
from ..training_run import Part
from ..upstream.loading_dtype import config_of, dtype_of
from ..upstream.tensor_parallel_trap import untrapped
from ..upstream.trainer import TrainerLike
from .base import Original
from .training import Training

if TYPE_CHECKING:
    from torch import nn

_MODEL: "Part[ref[Any]]" = Part("the model that a training was prepared for")


class DeviceMaps(Training):
    """Gives models a device map, and looks after it while they train."""

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load with a device map where that is ours to make."""
        scripts = attempt("reading in which dtype the script loads", _dtype_of_script, cls, args, kwargs)
        kwargs = insist("BALANCE_PRECISION", precision.adjust_loading, kwargs)
        mapped = kwargs.get("device_map") is not None
        action = "preparing from_pretrained"
        kwargs = attempt(action, _with_device_map, kwargs, self.has_own_devices, default=kwargs)
        calls.stack.append(Call(kwargs.get("device_map"), kwargs.get("max_memory"), scripts, mapped))
        try:
            loaded = original(cls, *args, **kwargs)
        finally:
            calls.stack.pop()
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if mapped:
            placed_models.remember_map(model)
        attempt("watching the outputs", outputs.arm, model, instead="outputs stay where the library puts them")
        return loaded

    def makes_map(self, device_map: Any) -> bool:
        """Return whether `BALANCE_INTERCEPT` covers `device_map`, where this process has devices of its own."""
        if not is_covered(device_map):
            return False
        if not self.has_own_devices():
            count = ranks.world_size(os.environ)
            log.once(
                "warning",
                f"device_map={device_map!r} in a run of {count} processes is left to the library, which trains no such "
                "model: start one process, or in mode balanced at most as many as there are devices",
            )
            return False
        return True

    def has_own_devices(self) -> bool:
        """Return whether no other process trains on the devices that a map would use."""
        return ranks.world_size(os.environ) == 1

    def before_trainer(self, init: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a placed model on its devices."""
        instead = "the model may be copied to each device"
        attempt("keeping a placed model whole", data_parallel.prevent, init, args, kwargs, instead=instead)
        action, instead = "keeping the map of a model inside", "the Trainer decides where it goes"
        attempt(action, wrapped_model.keep_given_map, init, args, kwargs, instead=instead)

    def make_model(
        self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Plan for the new model without the memory of the old one."""
        before = getattr(trainer, "model", None)
        leaving = attempt("counting the model that leaves", replaced_model.leaving, trainer, before, default={})
        with placed_models.leaving(leaving, before if hasattr(before, "modules") else None):
            model = original(trainer, *args, **kwargs)
        action, instead = "keeping the map of a model inside", "the Trainer decides where it goes"
        attempt(action, wrapped_model.keep_map, model, trainer.args, instead=instead)
        return model

    # Not when the trainer is made: trainers derived from transformers' load their other models after that.

    def before_training(self, trainer: TrainerLike) -> None:
        """Plan for the real workload, unless another model is to come (`model_init`)."""
        if trainer.model_init is None or not hasattr(trainer, "_inner_training_loop"):
            self.begin(trainer)
        else:
            action, instead = "activation checkpointing", "the script decides which layers are recomputed"
            attempt(action, checkpointing.switch_off_unsupported, trainer, innermost(trainer.model), instead=instead)

    def begin(self, trainer: TrainerLike) -> None:
        """Plan for the real workload of the model that `trainer` has now; arm the checks that watch and move it."""
        attempt("planning for the real workload", _plan_again, trainer, instead="training continues with its map")
        attempt("watching the outputs", outputs.arm, trainer.model, instead="outputs stay where the library puts them")
        super().begin(trainer)
        attempt("preparing to re-balance", _rebalance, trainer, instead="no block moves")
        instead = "micro-batches run one after the other"
        attempt("preparing micro-batches in flight", window.begin, trainer, instead=instead)
        _MODEL.keep(trainer, ref(trainer.model))

    def before_loop(self, trainer: TrainerLike) -> bool:
        """Prepare again if `model_init`, or the script's own trainer, has made another model since `train` began."""
        prepared = _MODEL.of(trainer)
        if prepared is not None and prepared() is trainer.model:  # a batch size that is looked for brings us here again
            return False
        if prepared is not None:
            training_run.end(trainer)
        attempt("releasing the previous model", replaced_model.let_go, trainer, instead="it is released later")
        with undisturbed():  # the seed is set by now
            self.begin(trainer)
        return True

    def step(
        self,
        original: Original,
        trainer: TrainerLike,
        model: "nn.Module",
        inputs: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Look at the batch before it runs, run it in portions where it must, and repair a map that does not run."""
        trainer_callback.saw_batch(trainer, inputs)
        rebalance.saw_batch(trainer, inputs)
        count = args[0] if args else kwargs.get("num_items_in_batch")

        def run(model: "nn.Module", inputs: Any, *args: Any, **kwargs: Any) -> Any:
            action, plain = "preparing the loss in chunks", nullcontext()
            with attempt(action, _loss_context, trainer, model, inputs, default=plain):
                loss = original(trainer, model, inputs, *args, **kwargs)
            return _returned(trainer, loss)

        def script(model: "nn.Module", inputs: Any) -> Any:
            return run(model, inputs, *args, **kwargs)

        def forward(inputs: Any) -> Any:
            return run(model, inputs, *map(not_waiting, args), **{name: not_waiting(kwargs[name]) for name in kwargs})

        def perform(inputs: Any) -> Any:
            parts = batch_check.portions_for(trainer, inputs, count is not None)
            adaptive = portions.of(trainer)
            if adaptive is not None:
                return adaptive.run(trainer, script, model, inputs, count is not None, least=parts)
            return portions.run_in_portions(trainer, script, model, inputs, parts, count is not None)

        def alone(inputs: Any) -> Any:
            return repair.run(trainer, perform, model, inputs, partial(_repaired, trainer))

        return window.run(window.StepRuns(trainer, model, count is not None, forward, perform, alone), inputs)

    def fetched(self, trainer: TrainerLike, samples: Any) -> None:
        """Remember which micro-batches may be in flight together."""
        window.fetched(trainer, samples)

    def evaluate(self, original: Original, trainer: TrainerLike, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the batches before they run, and repair a map that does not run."""
        repaired = partial(_repaired, trainer)
        with (
            repair.repairing_evaluation(trainer, repaired),
            evaluation_check.checking(trainer, original, ((trainer, *args), kwargs), repaired),
        ):
            return original(trainer, *args, **kwargs)

    def explain_out_of_memory(self, trainer: TrainerLike, failure: BaseException) -> None:
        """Name the place, the cause, and the map and settings that would have fitted."""
        from ..training.oom import explain  # only where it is needed

        placed = placed_models.placed(trainer.model)
        plan = None if placed is None else placed[1].plan
        model = trainer.model if placed is None else placed[0]
        explain.explain(trainer, model, plan, failure)


def is_covered(device_map: Any) -> bool:
    """Whether `BALANCE_INTERCEPT` has maps made in place of `device_map`."""
    intercept = state.settings().intercept
    # "none" was turned into "auto" on the way here.
    return isinstance(device_map, str) and (device_map in intercept or (device_map == "auto" and "none" in intercept))


def _dtype_of_script(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if state.settings().precision is None:
        return None
    return dtype_of(config_of(cls, args, kwargs), kwargs)


def _with_device_map(kwargs: dict[str, Any], has_own_devices: Callable[[], bool]) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`, changed where no map would be made otherwise."""
    if kwargs.get("device_map") is None and "none" in state.settings().intercept and not calls.stack:
        other_ways = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
        is_free = all(kwargs.get(way) is None for way in other_ways)
        if is_free and ranks.world_size(os.environ) == 1 and devices.count() > 1:
            kwargs = {**kwargs, "device_map": "auto"}
    return untrapped(kwargs, has_own_devices)


def _plan_again(trainer: TrainerLike) -> None:
    """Bring the placement of the trainer's model in line with the trainer's actual workload."""
    placed = placed_models.placed(trainer.model)
    if placed is None:
        _log_no_map(trainer)
        return
    model, (plan, _, max_memory, _) = placed
    action, instead = "placing modules that the script has put into the model", "they stay where they are"
    plan = attempt(action, changed_modules.settle, trainer, model, plan, default=plan, instead=instead)
    attempt("placing the modules around the model", outside.arrange, trainer, model, instead="it stays where it is")
    looks = batch_check.looks_at(trainer)
    may_wait = looks and trainer.args.world_size == 1  # blocks of replicas do not move once they train
    outcome = second_pass(trainer, model, plan, max_memory, may_wait=may_wait)
    _replanned(trainer, outcome.plan)
    if looks:
        batch_check.begin(trainer, outcome, max_memory, partial(_replanned, trainer))


def _log_no_map(trainer: TrainerLike) -> None:
    """Tell a user who armed the shim, on a machine with several devices, that this model was not placed by it."""
    alone = trainer.args.world_size == 1  # each process of several has its own device, and that is as it should be
    if alone and devices.count() > 1 and not placed_models.has_map(trainer.model):
        log.once(
            "info",
            "the model was loaded without a device_map, so it was not balanced; device_map='auto' in the script or "
            "BALANCE_INTERCEPT=auto,balanced,none lets the shim place it",
        )


def _replanned(trainer: TrainerLike, plan: Plan) -> None:
    """Remember the plan that is in force now, show it if its map is new, and tell those who work by it."""
    placed = placed_models.placed(trainer.model)
    assert placed is not None, "only placed models are planned again"
    model, before = placed
    placed_models.remember_placed(model, before._replace(plan=plan))
    report = state.settings().report
    if plan.device_map != before.plan.device_map:
        plan_report.show(plan, report, before.files, before.number)
    elif before.files is not None:
        plan_report.write(plan, report, before.files)
    trainer_callback.replanned(trainer, plan)
    rebalance.replanned(trainer, plan)
    window.replanned(trainer)


def _repaired(trainer: TrainerLike, plan: Plan) -> None:
    _replanned(trainer, plan)
    batch_check.replanned(trainer, plan)


def _rebalance(trainer: TrainerLike) -> None:
    placed = placed_models.placed(trainer.model)
    if placed is None:
        return
    model, (plan, *_) = placed

    def moved(better: Plan) -> None:
        placed_models.remember_placed(model, placed[1]._replace(plan=better))
        plan_report.show(better, state.settings().report, placed[1].files, placed[1].number)
        batch_check.replanned(trainer, better)
        window.replanned(trainer)

    rebalance.begin(trainer, model, plan, moved)


def _loss_context(trainer: TrainerLike, model: "nn.Module", inputs: Any) -> AbstractContextManager[None]:
    return step_context(trainer, placed_models.placed(trainer.model) is not None, model, inputs)


def _returned(trainer: TrainerLike, loss: Any) -> Any:
    """Return the loss of a step on the first device, where the Trainer adds it up and refuses it from any other.

    The model's own loss comes back there with the outputs; one that a trainer computes itself (TRL 1.16) does not.
    """
    first_device = trainer.args.device
    if getattr(trainer, "is_model_parallel", False) and getattr(loss, "device", first_device) != first_device:
        return loss.to(first_device)
    return loss
