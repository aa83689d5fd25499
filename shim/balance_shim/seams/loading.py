"""Seam 1, `transformers.modeling_utils`: where a string such as "auto" becomes a device map.

From 4.50 on that is `_get_device_map`, a function of its own; up to 4.49 it stands inside `from_pretrained`, which
calls `infer_auto_device_map` by a name imported into this module. Either way the model is on the meta device and the
quantizer has prepared it. `from_pretrained` itself is patched for what has to happen earlier.
"""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import local
from typing import Any, NamedTuple

from .. import cache, devices, log, state
from ..map_file import DeviceMap
from ..memory.colocation import NO_BONDS
from ..memory.workload import assume, longest_row
from ..patching import registry
from ..patching.guard import SeamMoved, attempt, insist
from ..placement import colocations, placed_models, planner
from ..placement.compared_heads import device_of_compared_head
from ..placement.fused_head import bonds_for as bonds_for_fused_head
from ..placement.plan import Plan, collapse
from ..placement.remedies import saved_by_chunks, saved_by_precision, what_would_fit
from ..placement.request import Request
from ..report import plan_report
from ..training import outputs, precision
from ..upstream.loading_dtype import config_of, dtype_of
from ..upstream.loss_device import computes_loss_on_first_device
from ..upstream.weight_sizes import ParameterBytes, for_dtypes, for_request
from ..versions import version_of, version_text
from ..zero import session
from ..zero.weights import loading as zero_loading
from ..zero.weights import saving
from .model_device import around_device

# 4.50 to 4.53 turn device_map="auto" into tensor parallelism when WORLD_SIZE is set, even to 1, before any map is made.
TENSOR_PARALLEL_TRAP = ((4, 50), (4, 54))


class _Call(NamedTuple):
    """A call of `from_pretrained`.

    `dtype`: in which weights would load without BALANCE_PRECISION; None where unset. `mapped`: whether the script
    itself gives a device map.
    """

    device_map: Any
    max_memory: Any
    dtype: Any
    mapped: bool = True


class _Loads(local):
    """The calls of `from_pretrained` under way in this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


_loads = _Loads()


@dataclass(frozen=True)
class _Load:
    """One model about to be placed, however this version of transformers says so."""

    model: Any
    device_map: str
    max_memory: Any
    no_split: Any
    parameter_bytes: ParameterBytes | None


def apply(module: Any) -> None:
    """Patch `transformers.modeling_utils`.

    Raises:
        SeamMoved: this version keeps the seam somewhere else.
    """
    version = version_of("transformers")
    seam, wrapper = ("_get_device_map", _around_get_device_map)
    if version < (4, 50):
        seam, wrapper = ("infer_auto_device_map", _around_infer_auto_device_map)
    for owner, name in ((getattr(module, "PreTrainedModel", None), "from_pretrained"), (module, seam)):
        if not callable(getattr(owner, name, None)):
            raise SeamMoved(f"transformers.modeling_utils.{name}", version_text("transformers"))
    registry.replace(module.PreTrainedModel, "from_pretrained", _around_from_pretrained)
    registry.replace(module, seam, wrapper)
    registry.replace(module.PreTrainedModel, "save_pretrained", _around_save_pretrained)
    if isinstance(getattr(module.PreTrainedModel, "device", None), property):
        registry.replace(module.PreTrainedModel, "device", around_device)


def _around_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        state.raise_pending()
        scripts = attempt("reading in which dtype the script loads", _dtype_of_script, cls, args, kwargs)
        kwargs = insist("BALANCE_PRECISION", precision.adjust_loading, kwargs)
        if state.settings().mode == "zero3" and not session.is_wanted():
            log.once("warning", f"BALANCE_MODE=zero3 does not act in {sys.argv[0]}, which starts the ranks")
        if session.is_wanted():
            return zero_loading.load(original, cls, args, kwargs)
        mapped = kwargs.get("device_map") is not None
        kwargs = attempt("preparing from_pretrained", _prepared, kwargs, default=kwargs)
        _loads.stack.append(_Call(kwargs.get("device_map"), kwargs.get("max_memory"), scripts, mapped))
        try:
            loaded = original(cls, *args, **kwargs)
        finally:
            _loads.stack.pop()
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if mapped:
            placed_models.remember_map(model)
        attempt("watching the outputs", outputs.arm, model, instead="outputs stay where the library puts them")
        return loaded

    return from_pretrained


def _dtype_of_script(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if state.settings().precision is None or session.is_wanted():
        return None
    return dtype_of(config_of(cls, args, kwargs), kwargs)


def _around_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.is_wanted():
            return saving.save(original, self, args, kwargs, trained=False)
        return original(self, *args, **kwargs)

    return save_pretrained


def _prepared(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`, changed where the seam would not be reached otherwise."""
    device_map = kwargs.get("device_map")
    settings = state.settings()
    if device_map is None and "none" in settings.intercept and not _loads.stack and _placeable(kwargs):
        return {**kwargs, "device_map": "auto"}
    oldest, fixed = TENSOR_PARALLEL_TRAP
    if device_map == "auto" and oldest <= version_of("transformers") < fixed and os.environ.get("WORLD_SIZE") == "1":
        return {**kwargs, "device_map": "balanced"}  # means the same and is not trapped
    return kwargs


def _placeable(kwargs: dict[str, Any]) -> bool:
    """Whether a load without a device map may get one: one process, several devices, no other way of sharding."""
    other_ways = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
    return _world_size() == 1 and devices.count() > 1 and all(kwargs.get(way) is None for way in other_ways)


def _around_get_device_map(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_device_map(model: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        planned = attempt("planning the device map", _plan_load, original, model, device_map, args, kwargs)
        if planned is None:
            return original(model, device_map, *args, **kwargs)
        # Given a map, the library checks it (4.x: its ties) but no longer asks the quantizer, so we do.
        checked = original(model, planned, *args, **kwargs)
        quantizer = _bind(original, model, device_map, args, kwargs).get("hf_quantizer")
        if quantizer is not None:
            quantizer.validate_environment(device_map=checked)
        return checked

    return get_device_map


def _plan_load(
    original: Callable[..., Any], model: Any, device_map: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DeviceMap | None:
    if not _intercepted(device_map):
        return None
    given = _bind(original, model, device_map, args, kwargs)
    quantizer, dtype = given.get("hf_quantizer"), given.get("dtype", given.get("torch_dtype"))
    no_split = model._no_split_modules
    if version_of("transformers") < (5, 1):
        try:
            no_split = model._get_no_split_modules(device_map)
        except ValueError:
            return None  # the model does not support device maps, and the library says so
    sizes = for_request(model, quantizer, dtype)
    return _place(_Load(model, device_map, given.get("max_memory"), no_split, sizes))


def _bind(
    original: Callable[..., Any], model: Any, device_map: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments by name: their number and order change between versions."""
    from inspect import signature

    return dict(signature(original).bind(model, device_map, *args, **kwargs).arguments)


def _around_infer_auto_device_map(original: Callable[..., Any]) -> Callable[..., Any]:
    def infer_auto_device_map(model: Any, *args: Any, **kwargs: Any) -> Any:
        planned = attempt("planning the device map", _plan_inferred, model, kwargs)
        return original(model, *args, **kwargs) if planned is None else planned

    return infer_auto_device_map


def _plan_inferred(model: Any, kwargs: dict[str, Any]) -> DeviceMap | None:
    call = _loads.stack[-1] if _loads.stack else _Call(None, None, None)
    device_map, max_memory = call.device_map, call.max_memory
    if not _intercepted(device_map):
        return None
    sizes = for_dtypes(model, kwargs.get("dtype"), kwargs.get("special_dtypes"))
    assert isinstance(device_map, str), "only strings are intercepted"
    return _place(_Load(model, device_map, max_memory, kwargs.get("no_split_module_classes"), sizes))


def _intercepted(device_map: Any) -> bool:
    """Whether this map is ours to make."""
    settings = state.settings()
    if not isinstance(device_map, str) or settings.mode in ("off", "zero3"):
        return False
    # "none" was turned into "auto" on the way here.
    wanted = device_map in settings.intercept or (device_map == "auto" and "none" in settings.intercept)
    if wanted and _world_size() > 1:
        log.once(
            "warning",
            f"device_map={device_map!r} in a run of {_world_size()} processes is left to the library: each of them "
            "would spread its model over all devices",
        )
        return False
    if not wanted and settings.mode == "map":
        log.once(
            "warning",
            f"the script loads with device_map={device_map!r}, which BALANCE_INTERCEPT leaves alone: "
            "BALANCE_DEVICE_MAP is not used for this model",
        )
    return wanted


def _place(load: _Load) -> DeviceMap | None:
    settings = state.settings()
    if placed_models.placed_models():
        gc.collect()  # hooks make cycles, so a model that nobody uses any more (the fold before) may still be there
    usable = devices.inventory(settings, load.max_memory, leaving=placed_models.bytes_leaving())
    mode = _chosen_mode(settings)
    if mode == "balanced" and len(usable) < 2:
        there = f"{len(usable)} device" if usable else "no device"
        log.once("info", f"{there} to use: nothing to balance, the library places the model")
        return None
    workload = assume(settings, placed_models.arguments(), longest_row(load.model.config))
    folder = cache.folder_of(settings.cache)
    colocated = colocations.recall(load.model, folder)
    if mode == "balanced" and colocated.library_map:
        log.info("an earlier training ran only under the library's own map, which is used again")
        return None
    what, instead = "looking for a fused head", "norm and head may be on two devices"
    fused = attempt(
        what, bonds_for_fused_head, load.model, placed_models.arguments(), default=NO_BONDS, instead=instead
    )
    request = Request(
        load.model,
        workload,
        usable,
        load.no_split,
        load.parameter_bytes,
        loss_on_first=computes_loss_on_first_device(load.model),
        selective=settings.gradient_checkpointing == "auto",
        may_chunk=settings.loss == "full",
        may_halve=precision.could_halve(),
        cache=folder,
        bonds=colocated.bonds.and_those(fused) if mode == "balanced" else NO_BONDS,
        head_device=device_of_compared_head(load.model, placed_models.compared_models()),
    )
    plan: Plan | None
    if mode == "map":
        assert settings.device_map is not None, "settings without a map in mode map are fatal"
        plan = planner.from_user(request, settings.device_map, devices.count())
        for note in plan.notes:
            log.info(note)
    else:
        plan = _balanced(request, load.max_memory)
    if plan is None:
        return None
    instead = "the plan is used anyway"
    for what, compared in (("a loss in chunks", _chunks_line), ("the script's own precision", _precision_line)):
        line = attempt(f"comparing with {what}", compared, plan, request, default="", instead=instead)
        if line:
            plan = replace(plan, notes=(*plan.notes, line))
            if mode == "map":  # whose notes are not among what is shown
                log.info(line)
    number = placed_models.next_number()
    files = attempt("reporting the plan", plan_report.show, plan, settings.report, None, number, instead=instead)
    placed_models.remember_placed(load.model, placed_models.Placed(plan, files, load.max_memory, number))
    if _loads.stack and not _loads.stack[-1].mapped:
        placed_models.remember_no_map(load.model)
    if mode == "balanced" and plan.shortfall and not workload.guessed:
        log.warning(plan_report.shortfall_line(plan, what_would_fit(plan, request)))
    return collapse(plan.device_map)


def _balanced(request: Request, max_memory: Any) -> Plan | None:
    """Return the balanced plan, without display cards unless nothing fits without them."""
    larger, left_out = devices.without_display_cards(request.devices, state.settings(), max_memory)
    if not left_out:
        return planner.balanced(request)
    plan = planner.fitting(replace(request, devices=larger))
    if plan is None:
        return planner.balanced(request)
    log.info(
        f"{left_out} not used: less than a tenth of the largest device's memory; a device that BALANCE_MAX_MEMORY "
        "names (INDEX=SIZE) is used anyway"
    )
    return plan


def _chunks_line(plan: Plan, request: Request) -> str:
    return plan_report.chunks_line(saved_by_chunks(plan, request))


def _precision_line(plan: Plan, request: Request) -> str:
    scripts = _loads.stack[-1].dtype if _loads.stack else None
    if scripts is None or request.parameter_bytes is not None or plan.recomputed is not None:
        return ""
    dtype = str(scripts).removeprefix("torch.")
    autocast = precision.autocast_of_script(placed_models.arguments())
    return plan_report.precision_line(
        str(state.settings().precision), dtype, saved_by_precision(plan, request, dtype, autocast)
    )


def _chosen_mode(settings: Any) -> str:
    if settings.mode != "auto":
        return str(settings.mode)
    mode, why = ("map", "BALANCE_DEVICE_MAP is set") if settings.device_map else ("balanced", "no map was given")
    log.once("info", f"mode auto chooses {mode}: {why}")
    return mode


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1
