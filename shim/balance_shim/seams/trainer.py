"""Seam 2b, `transformers.trainer`: here the workload is known, and the loss must find its way between devices."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any
from weakref import ref

from .. import devices, log, state
from ..monitoring import trainer_callback
from ..monitoring.out_of_memory import is_out_of_memory
from ..patching import registry
from ..patching.guard import SeamMoved, attempt, insist
from ..placement import placed_models
from ..placement.plan import Plan
from ..report import plan_report
from ..rng import undisturbed
from ..training import (
    batch_check,
    changed_modules,
    checkpointing,
    data_parallel,
    evaluation_check,
    micro_batch,
    outputs,
    outside,
    rebalance,
    repair,
    replaced_model,
    wrapped_model,
)
from ..training.actual_workload import innermost
from ..training.chunked_loss import step_context
from ..training.replan import second_pass
from ..upstream.loss_device import computes_loss_on_first_device
from ..versions import version_of, version_text
from ..zero import calls, engine, matrix_optimizers, meeting, multiple_trainers, resume, session
from ..zero.weights import saving

# The versions that count the label tokens of a step, and those that do it in a method of its own.
COUNTS_ITEMS_SINCE = (4, 46)
COUNTS_ITEMS_APART_SINCE = (4, 57)
# From the one to below the other, each rank looks for the best checkpoint's folder, and none waits for its writer.
LOOKS_TOO_EARLY = ((4, 50), (4, 57))


def apply(module: Any) -> None:
    """Patch `transformers.trainer`.

    Raises:
        SeamMoved: this version keeps a seam somewhere else.
    """
    version = version_of("transformers")
    patches: list[tuple[str, Callable[..., Any]]] = [("train", _around_train), ("training_step", _around_step)]
    patches.append(("__init__", _around_init))
    patches.append(("create_optimizer", _around_create_optimizer))
    patches.append(("create_accelerator_and_postprocess", _around_create_accelerator))
    patches.append(("evaluation_loop", _around_evaluation_loop))
    if version >= COUNTS_ITEMS_SINCE:
        patches.append(("compute_loss", _around_compute_loss))
    if version >= COUNTS_ITEMS_APART_SINCE:
        patches.append(("_get_num_items_in_batch", _around_item_count))
    elif version >= COUNTS_ITEMS_SINCE:
        patches.append(("get_batch_samples", _around_batch_samples))
    patches.append(("save_model", _around_save_model))
    for name, _ in patches:
        if not callable(getattr(getattr(module, "Trainer", None), name, None)):
            raise SeamMoved(f"transformers.Trainer.{name}", version_text("transformers"))
    for name, wrapper in (*patches, *_SWAPS):
        if callable(getattr(module.Trainer, name, None)):
            registry.replace(module.Trainer, name, wrapper)
    registry.replace(module, "deepspeed_load_checkpoint", _around_load_checkpoint)


def _around_train(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not when the trainer is made: trainers derived from this one load their other models after that.
        if session.is_wanted():
            insist("training with several trainers", multiple_trainers.take_over, self)
            insist("preparing the training with ZeRO-3", engine.prepare, self)
        if session.is_wanted() or self.model_init is None or not hasattr(self, "_inner_training_loop"):
            _begin(self)
        else:
            what, instead = "activation checkpointing", "the script decides which layers are recomputed"
            attempt(what, checkpointing.switch_off_unsupported, self, innermost(self.model), instead=instead)
        try:
            result = original(self, *args, **kwargs)
        except BaseException as failure:
            with suppress(Exception):  # nothing of ours, also under BALANCE_STRICT, takes the place of this failure
                if is_out_of_memory(failure):
                    attempt("explaining the out-of-memory", _explain, self, failure, instead="here is the error")
            with suppress(Exception):
                _end(self)
            raise
        _end(self)
        return result

    return train


def _around_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not session.is_wanted():
            instead = "the model may be copied to each device"
            attempt(
                "keeping a placed model whole", data_parallel.prevent, original, (self, *args), kwargs, instead=instead
            )
            what, instead = "keeping the map of a model inside", "the Trainer decides where it goes"
            attempt(what, wrapped_model.keep_given_map, original, (self, *args), kwargs, instead=instead)
        original(self, *args, **kwargs)

    return __init__


def _begin(trainer: Any) -> None:
    """Do what is to be done before the model that the trainer has now begins to train."""
    if not session.is_wanted():
        attempt("planning for the real workload", _prepare, trainer, instead="training continues with its map")
        attempt("watching the outputs", outputs.arm, trainer.model, instead="outputs stay where the library puts them")
    attempt("activation checkpointing", _checkpoint, trainer, instead="the script decides which layers are recomputed")
    attempt("preparing micro-batches", micro_batch.begin, trainer, instead="they stay as they are")
    attempt("watching memory", _watch, trainer, instead="memory is not monitored")
    attempt("preparing to re-balance", _rebalance, trainer, instead="no block moves")
    trainer._balance_shim_begun = ref(trainer.model)


def _end(trainer: Any) -> None:
    attempt("watching memory", trainer_callback.end, trainer, instead="its last lines are missing")
    attempt("re-balancing", rebalance.end, trainer, instead="its callback stays")
    attempt("activation checkpointing", checkpointing.end, trainer, instead="its callback stays")
    batch_check.end(trainer)
    vars(trainer).pop("_balance_shim_begun", None)


def _around_inner_training_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def _inner_training_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = vars(self).get("_balance_shim_begun", _nothing)()
        if begun is self.model or session.is_wanted():  # a batch size that is looked for brings us here again
            return original(self, *args, **kwargs)
        # `model_init` has made another model since `train` was called, or the script's own trainer has.
        if begun is not None:
            _end(self)
        del begun
        attempt("releasing the previous model", replaced_model.let_go, self, instead="it is released later")
        with undisturbed():  # the seed is set by now
            _begin(self)
        if args and not self.args.auto_find_batch_size:
            args = (self._train_batch_size, *args[1:])  # BALANCE_MICRO_BATCH=auto may have changed it
        return original(self, *args, **kwargs)

    return _inner_training_loop


def _nothing() -> None:
    return None


def _around_call_model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_model_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self, "model", None)
        leaving = attempt("counting the model that leaves", replaced_model.leaving, self, before, default={})
        with placed_models.leaving(leaving, before if hasattr(before, "modules") else None):
            model = original(self, *args, **kwargs)
        if not session.is_wanted():
            what, instead = "keeping the map of a model inside", "the Trainer decides where it goes"
            attempt(what, wrapped_model.keep_map, model, self.args, instead=instead)
        return model

    return call_model_init


# Where a trainer's model becomes another one. Private, so that a version without them loses no more than that.
_SWAPS = (("_inner_training_loop", _around_inner_training_loop), ("call_model_init", _around_call_model_init))


def _around_create_accelerator(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_accelerator_and_postprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not session.is_wanted():
            return original(self, *args, **kwargs)
        insist("making room for another trainer", multiple_trainers.make_room, self)
        result = original(self, *args, **kwargs)
        insist("remembering the state of accelerate", multiple_trainers.remember, self)
        return result

    return create_accelerator_and_postprocess


def _around_evaluation_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.is_wanted():
            insist("evaluating with several trainers", multiple_trainers.take_over, self)
            meeting.meet("an evaluation or prediction")
            with calls.together():
                return original(self, *args, **kwargs)
        on_first, repaired = computes_loss_on_first_device, partial(_repaired, self)
        with (
            repair.repairing_evaluation(self, on_first, repaired),
            evaluation_check.checking(self, original, ((self, *args), kwargs), on_first, repaired),
        ):
            return original(self, *args, **kwargs)

    return evaluation_loop


def _around_compute_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = kwargs.get("num_items_in_batch")
        if count is None or not session.is_wanted():
            return original(self, *args, **kwargs)
        from ..zero import mean_loss  # needs torch

        what, instead = "noting who counts tokens", "the loss may be that of one process, times their number"
        kwargs["num_items_in_batch"] = count = attempt(
            what, mean_loss.noted, self, count, default=count, instead=instead
        )
        result = original(self, *args, **kwargs)
        return insist("finding the mean of the ranks", mean_loss.corrected, self, result, count)

    return compute_loss


def _around_create_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        if session.is_wanted() and hasattr(optimizer, "param_groups"):
            attempt("looking at the optimizer", matrix_optimizers.warn, optimizer)
            # LoRA leaves one of them empty on 4.x. DeepSpeed drops it, and torch's scheduler then misses it.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    return create_optimizer


def _around_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def deepspeed_load_checkpoint(deepspeed_engine: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if session.is_wanted():
            insist("preparing the checkpoint", resume.prepare, deepspeed_engine, checkpoint_path)
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)

    return deepspeed_load_checkpoint


def _around_save_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> Any:
        wanted = session.is_wanted()
        if wanted and saving.is_divided(self.model):
            meeting.meet("saving the model")
        result = original(self, output_dir, _internal_call)
        if wanted and _internal_call and LOOKS_TOO_EARLY[0] <= version_of("transformers") < LOOKS_TOO_EARLY[1]:
            # A rank that misses it does not load the best weights in the end, and the others wait for it.
            saving.wait_for_all()
        return result

    return save_model


def _around_item_count(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_num_items_in_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _placeless(self, original(self, *args, **kwargs))

    return _get_num_items_in_batch


def _around_batch_samples(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        samples, count = original(self, *args, **kwargs)
        return samples, _placeless(self, count)

    return get_batch_samples


def _around_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer_callback.saw_batch(self, inputs)
        rebalance.saw_batch(self, inputs)
        if session.is_wanted():
            with engine.watched(self, inputs), calls.together():
                return original(self, model, inputs, *args, **kwargs)

        def run(model: Any, inputs: Any) -> Any:
            context = attempt("preparing the loss in chunks", _loss_context, self, model, inputs, default=nullcontext())
            with context:
                loss = original(self, model, inputs, *args, **kwargs)
            return _returned(self, loss)

        counted = (args[0] if args else kwargs.get("num_items_in_batch")) is not None

        def perform(inputs: Any) -> Any:
            count = batch_check.portions_for(self, inputs, counted)
            portions = micro_batch.portions_of(self)
            if portions is not None:
                return portions.run(self, run, model, inputs, counted, least=count)
            return micro_batch.run_in_portions(self, run, model, inputs, count, counted)

        return repair.run(self, perform, model, inputs, computes_loss_on_first_device, partial(_repaired, self))

    return training_step


def _loss_context(trainer: Any, model: Any, inputs: Any) -> AbstractContextManager[None]:
    return step_context(trainer, placed_models.placed(trainer.model) is not None, model, inputs)


def _returned(trainer: Any, loss: Any) -> Any:
    """Return the loss of a step on the first device, where the Trainer adds it up and refuses it from any other.

    The model's own loss comes back there with the outputs; one that a trainer computes itself (TRL 1.16) does not.
    """
    home = trainer.args.device
    if getattr(trainer, "is_model_parallel", False) and getattr(loss, "device", home) != home:
        return loss.to(home)
    return loss


def _placeless(trainer: Any, count: Any) -> Any:
    """Return the number of label tokens on the host when the model spans several devices.

    The Trainer moves it to the first device, while the loss that is divided by it comes from the head's device; TRL
    1.16 divides the one by the other as they are, which stops the program. A single value on the host goes with
    any device, and stays a tensor, which trainers of users' own move with `.to`.
    """
    if getattr(trainer, "is_model_parallel", False) and hasattr(count, "cpu") and count.dim() == 0:
        return count.cpu()
    return count


def _prepare(trainer: Any) -> None:
    """Bring the placement of the trainer's model in line with what the trainer really does."""
    placed = placed_models.placed(trainer.model)
    if placed is None:
        _say_unused(trainer)
        return
    model, (plan, _, max_memory, _) = placed
    what, instead = "placing modules that the script has put into the model", "they stay where they are"
    plan = attempt(what, changed_modules.settle, trainer, model, plan, default=plan, instead=instead)
    attempt("placing the modules around the model", outside.arrange, trainer, model, instead="it stays where it is")
    on_first, looks = computes_loss_on_first_device(model), batch_check.looks_at(trainer)
    outcome = second_pass(trainer, model, plan, on_first, max_memory, may_wait=looks)
    _replanned(trainer, outcome.plan)
    if looks:
        batch_check.begin(trainer, outcome, on_first, max_memory, partial(_replanned, trainer))


def _replanned(trainer: Any, plan: Plan) -> None:
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


def _repaired(trainer: Any, plan: Plan) -> None:
    _replanned(trainer, plan)
    batch_check.replanned(trainer, plan)


def _checkpoint(trainer: Any) -> None:
    placed = placed_models.placed(trainer.model)
    if placed is None:
        checkpointing.arrange(trainer, innermost(trainer.model), None)
    else:
        checkpointing.arrange(trainer, placed[0], placed[1].plan)


def _watch(trainer: Any) -> None:
    placed = placed_models.placed(trainer.model)
    trainer_callback.begin(trainer, None if placed is None else placed[1].plan)


def _rebalance(trainer: Any) -> None:
    placed = placed_models.placed(trainer.model)
    if placed is None or session.is_wanted():
        return
    model, (plan, *_) = placed

    def moved(better: Plan) -> None:
        placed_models.remember_placed(model, placed[1]._replace(plan=better))
        plan_report.show(better, state.settings().report, placed[1].files, placed[1].number)
        batch_check.replanned(trainer, better)

    rebalance.begin(trainer, model, plan, computes_loss_on_first_device(model), moved)


def _explain(trainer: Any, failure: BaseException) -> None:
    if session.is_wanted():  # no map could help
        engine.explain_out_of_memory(trainer)
        return
    from ..training import explain_oom  # only where it is needed

    placed = placed_models.placed(trainer.model)
    plan = None if placed is None else placed[1].plan
    model = trainer.model if placed is None else placed[0]
    explain_oom.explain(trainer, model, plan, failure, computes_loss_on_first_device(model))


def _say_unused(trainer: Any) -> None:
    """Tell a user who armed the shim, on a machine with several devices, that this model was not placed by it."""
    alone = trainer.args.world_size == 1  # each process of several has its own device, and that is as it should be
    if alone and devices.count() > 1 and not placed_models.has_map(trainer.model):
        log.once(
            "info",
            "the model was loaded without a device_map, so it was not balanced; device_map='auto' in the script or "
            "BALANCE_INTERCEPT=auto,balanced,none lets the shim place it",
        )
