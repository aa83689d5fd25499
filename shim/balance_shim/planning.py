"""A plan outside of any training, for `balance_shim.plan` and `balance-shim plan`."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import BalanceError, ModelError
from .language.message import Message
from .plan_options import PRECISIONS, PlanOptions, read_options

if TYPE_CHECKING:
    from .device import Device
    from .placement.alternatives import Limits
    from .placement.plan import Plan
    from .placement.request import Request
    from .replicas.shares import Share
    from .upstream.meta_model import Unloaded
    from .upstream.model_config import ModelConfig

# `plan()` takes the options of the command by these names.
_WORKLOAD = (
    "batch_size", "seq_len", "accumulation", "tuning", "optimizer", "precision", "gradient_checkpointing", "loss",
    "pipeline",
)  # fmt: skip
_SETTINGS = ("reserve", "max_memory", "cache")


@dataclass(frozen=True)
class Subject:
    """A model on the meta device, with its config, class and dtype.

    Attributes:
        resolved: its config and class.
        named_dtype: the torch dtype that was asked for or that its config names; None: neither.
        dtype: that of its weights in the plan.
        ready: the model, prepared as in a load.
    """

    resolved: "ModelConfig"
    named_dtype: Any
    dtype: Any
    ready: "Unloaded"


def plan(model: Any, devices: str = "", *, trust_remote_code: bool = False, **workload: Any) -> "Plan":
    """Plan the training of a model on devices that need not exist.

    Args:
        model: a `PreTrainedModel` (parameters that require gradients train), a config, or a path or hub id.
        devices: such as "4x24GiB" or "8xH100"; by default those of `BALANCE_SIMULATE`.
        trust_remote_code: whether code that comes with the model may run.
        workload: `batch_size`, `seq_len`, `accumulation`, `tuning`, `optimizer`, `precision`,
            `gradient_checkpointing`, `loss`, as the options of `balance-shim plan`; `reserve`, `max_memory` and
            `cache` as the variables. `BALANCE_*` variables are the defaults.

    Returns:
        The plan; sizes in bytes. `plan.shortfall` is 0 if it fits.

    Raises:
        BalanceError: a value cannot be used, the model cannot be built, or no map can hold it.
        TypeError: an unknown name in `workload`.
    """
    unknown = sorted(set(workload) - {*_WORKLOAD, *_SETTINGS})
    if unknown:
        raise TypeError(f"plan() has no argument {unknown[0]!r}; there are {', '.join((*_WORKLOAD, *_SETTINGS))}")
    options = _options(devices, workload, trust_remote_code)
    with quiet_libraries():
        if hasattr(model, "named_parameters"):
            request = _request_for_model(model, options)
        else:
            request = request_for(subject_of(model, options), options)
        return _solved(request)


def subject_of(model: Any, options: PlanOptions) -> Subject:
    """Build `model`, a config or a name, on the meta device.

    Raises:
        ModelError: it cannot be found or built.
    """
    from .upstream import model_config

    # Before the libraries are imported, which takes longer than all the rest: most mistakes show here.
    by_name = isinstance(model, (str, os.PathLike))
    name = os.fspath(model) if by_name else type(model).__name__
    find = model_config.find if by_name else model_config.of
    resolved = find(name if by_name else model, options.trust_remote_code)

    import torch

    from .upstream.meta_model import unloaded

    named = (
        getattr(torch, PRECISIONS[options.precision]) if options.precision else model_config.dtype_of(resolved.config)
    )
    dtype = named or torch.bfloat16
    try:
        ready = unloaded(resolved.model_class, resolved.config, dtype, options.machine.capacities)
    except Exception as error:  # of the model's or the quantizer's making
        reason = model_config.one_line(error)
        raise ModelError(f"{name}: cannot be built from its config: {reason}") from error
    return Subject(resolved, named, dtype, ready)


def request_for(subject: Subject, options: PlanOptions) -> "Request":
    """Return the request to plan `subject` as `options` ask for."""
    ready = subject.ready
    return _request(ready.model, options, ready.no_split, parameter_bytes=ready.parameter_bytes)


def limits_of(subject: Subject, options: PlanOptions) -> "Limits":
    """Return what a training on the devices that are planned for could not do."""
    from . import zero_support
    from .placement.alternatives import Limits

    quantized = getattr(subject.resolved.config, "quantization_config", None) is not None
    name = type(subject.ready.model).__name__
    return Limits(
        zero3=zero_support.sentence("quantized", cls=name) if quantized else "",
        pipeline={
            "off": Message("BALANCE_PIPELINE is off"),
            1: Message("BALANCE_PIPELINE=1 has one micro-batch in flight"),
        }.get(options.settings.pipeline, ""),
        in_flight=options.settings.pipeline if isinstance(options.settings.pipeline, int) else None,
        may_recompute=options.settings.gradient_checkpointing is None,
    )


def replica_of(request: "Request", replicas: int | str) -> "tuple[Request, tuple[Share, ...]]":
    """Return the request for the share with the least memory, and all shares of the request's devices.

    Args:
        replicas: how many; "auto": the most that fit.
    """
    from .placement.replica_plans import most_that_fit, of_shares
    from .replicas.shares import divide

    sizes = {device.index: device.available for device in request.devices}
    count = replicas if isinstance(replicas, int) else most_that_fit(request, partial(divide, sizes))
    if count == 1:
        return request, (tuple(sizes),)
    shares = divide(sizes, count)
    return of_shares(request, shares)[0], shares


def devices_of(options: PlanOptions) -> "tuple[Device, ...]":
    """Return the devices that `options` name, within the limits that were set for them."""
    from .device import describe

    machine, settings = options.machine, options.settings
    return tuple(
        describe(
            index,
            f"cuda:{index}",
            _capped(capacity, index, settings.max_memory),
            settings,
            architecture,
            machine.kind(index),
        )
        for index, (capacity, architecture) in enumerate(zip(machine.capacities, machine.architectures, strict=True))
    )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the output of libraries and remote code off standard output, and drop their warnings.

    They are about loading and running, which does not happen here.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    spoken = io.StringIO()
    try:
        with contextlib.redirect_stdout(spoken), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _request_for_model(model: Any, options: PlanOptions) -> "Request":
    return _request(
        model,
        options,
        getattr(model, "_no_split_modules", None),
        trains=lambda _, parameter: parameter.requires_grad,
    )


def _request(model: Any, options: PlanOptions, no_split: Collection[str] | None, **more: Any) -> "Request":
    from .memory.training_case import TrainingCase
    from .memory.workload import assume, in_equal_chunks, longest_row
    from .placement import planner
    from .placement.request import Request

    settings = options.settings
    workload = assume(settings, None, longest_row(model.config))
    workload = replace(workload, accumulation=options.accumulation)
    if isinstance(settings.pipeline, int):
        workload = replace(workload, in_flight=in_equal_chunks(settings.pipeline, options.accumulation))
    case = TrainingCase.of(model, workload, no_split, **more)
    request = Request.from_settings(settings, case, devices_of(options), may_halve=not options.precision)
    if settings.pipeline == "auto" and not options.chooses_remedy:
        return planner.with_most_in_flight(request)
    return request


def _solved(request: "Request") -> "Plan":
    from .placement import planner
    from .placement.balance import DoesNotFit

    name = request.case.structure.model_class
    try:
        costed, recomputed = planner.costed_for(request)
        solution = planner.solved(request, costed, recomputed)
    except DoesNotFit as gap:
        raise BalanceError(f"{name} fits under no map: {gap}") from None
    if solution is None:
        raise BalanceError(f"{name} cannot run with its layers on several devices, as a dry run shows")
    return solution


def _options(devices: str, workload: dict[str, Any], trust_remote_code: bool) -> PlanOptions:
    """Return keyword arguments as the command would read them, so that there is one set of rules and messages."""
    arguments = ["model", *(["--gpus", devices] if devices else [])]
    arguments += ["--trust-remote-code"] if trust_remote_code else []
    environ = dict(os.environ)
    for name, value in workload.items():
        if value is None:
            continue
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if name in _SETTINGS:
            environ[f"BALANCE_{name.upper()}"] = text
        else:
            arguments.append(f"--{name.replace('_', '-')}={text}")
    return read_options(arguments, environ)[0]


def _capped(capacity: int, index: int, caps: int | dict[int, int] | None) -> int:
    cap = caps.get(index) if isinstance(caps, dict) else caps
    return capacity if cap is None else min(capacity, cap)
