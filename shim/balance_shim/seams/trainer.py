"""Seam 2b, `transformers.trainer`: here the workload is known, and the loss must find its way between devices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import devices, log, state
from ..memory.actual_workload import actual_workload
from ..placement import planner
from ..placement.balance import balance
from ..placement.plan import Plan, evaluate
from ..report import plan_report
from ..units import format_size
from ..versions import version_of, version_text
from . import known, registry
from .guard import SeamMoved, attempt
from .loss_device import computes_loss_on_first_device

# The versions that count the label tokens of a step, and those that do it in a method of its own.
COUNTS_ITEMS_SINCE = (4, 46)
COUNTS_ITEMS_APART_SINCE = (4, 57)
WORTH_SAYING = 0.95  # a new map is mentioned when it brings the worst device to this part of what it is, or below


def apply(module: Any) -> None:
    """Patch `transformers.trainer`.

    Raises:
        SeamMoved: this version keeps a seam somewhere else.
    """
    version = version_of("transformers")
    patches: list[tuple[str, Callable[..., Any]]] = [("__init__", _around_init), ("training_step", _around_step)]
    if version >= COUNTS_ITEMS_APART_SINCE:
        patches.append(("_get_num_items_in_batch", _around_item_count))
    elif version >= COUNTS_ITEMS_SINCE:
        patches.append(("get_batch_samples", _around_batch_samples))
    for name, _ in patches:
        if not callable(getattr(getattr(module, "Trainer", None), name, None)):
            raise SeamMoved(f"transformers.Trainer.{name}", version_text("transformers"))
    for name, wrapper in patches:
        registry.replace(module.Trainer, name, wrapper)


def _around_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attempt("recording the workload", _record, self, instead="training goes on")

    return __init__


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
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _returned(self, original(self, *args, **kwargs))

    return training_step


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


def _record(trainer: Any) -> None:
    """Say what the training really is, beside what the plan supposed."""
    settings = state.settings()
    placed = known.placed(trainer.model)
    if placed is None:
        _say_unused(trainer)
        return
    model, plan = placed
    workload = actual_workload(trainer, plan.workload)
    usable = tuple(each.device for each in plan.devices)
    request = planner.Request(model, workload, usable, loss_on_first=computes_loss_on_first_device(model))
    costed = planner.cost(replace(request, trains=lambda _, parameter: parameter.requires_grad))
    actual = evaluate(plan.mode, costed, plan.device_map, usable)
    known.remember_plan(model, actual)
    if settings.report != "off":
        log.info(plan_report.beside(plan, actual))
    if actual.shortfall:
        remedies = planner.what_would_fit(actual, request)
        log.warning(plan_report.shortfall_line(actual, remedies))
    if plan.mode == "balanced":
        better = evaluate(plan.mode, costed, balance(costed, usable), usable)
        if better.worst.filled <= WORTH_SAYING * actual.worst.filled:
            log.info(
                f"a map made for this workload would have its worst device at "
                f"{format_size(better.worst.predicted_peak)} instead of {format_size(actual.worst.predicted_peak)}: "
                f"set {_as_variables(actual)}"
            )


def _as_variables(plan: Plan) -> str:
    workload = plan.workload
    return (
        f"BALANCE_TUNING={workload.tuning} BALANCE_BATCH_SIZE={workload.batch_size} BALANCE_SEQ_LEN={workload.seq_len}"
    )


def _say_unused(trainer: Any) -> None:
    """Tell a user who armed the shim, on a machine with several devices, that this model was not placed by it."""
    alone = trainer.args.world_size == 1  # each process of several has its own device, and that is as it should be
    if alone and devices.count() > 1 and getattr(trainer.model, "hf_device_map", None) is None:
        log.once(
            "info",
            "the model was loaded without a device_map, so it was not balanced; device_map='auto' in the script or "
            "BALANCE_INTERCEPT=auto,balanced,none lets the shim place it",
        )
