"""The remedies that mode `auto` cannot use in this process, and why: checked before anything is predicted."""

import os
import sys
from typing import Any

from .. import devices, simulation, state, zero_support
from ..device import Device
from ..errors import BalanceError
from ..placement.alternatives import Limits
from ..placement.model_load import ModelLoad
from ..processes import is_worker
from ..zero.launching import relaunch, requirements

PIPELINE_OFF = {
    "off": "BALANCE_PIPELINE is off, as it is by default until it has run on GPUs",
    1: "BALANCE_PIPELINE=1 has one micro-batch in flight",
}


def limits_for(load: ModelLoad, usable: tuple[Device, ...]) -> Limits:
    """Return the remedies that this process cannot use for the model that is about to load."""
    settings = state.settings()
    launching = _cannot_launch()
    return Limits(
        replicas=launching,
        zero3=launching or _cannot_partition(load.model, usable),
        pipeline=PIPELINE_OFF.get(settings.pipeline, ""),
        in_flight=settings.pipeline if isinstance(settings.pipeline, int) else None,
        host_memory=_host_memory(),
        may_recompute=settings.gradient_checkpointing is None,
    )


def _cannot_launch() -> str:
    """Return why this process cannot become several; "" if it can."""
    if relaunch.is_launched(os.environ):
        return "a launcher has started this process, and decides how many there are"
    if is_worker():
        return "this process works for another one"
    if relaunch.has_own_launcher(sys.orig_argv):
        return "this program starts its ranks itself"
    arming = state.arming()
    if arming is None or arming.environ.get("BALANCE_MODE", "").strip() != os.environ.get("BALANCE_MODE", "").strip():
        return "the mode was set by install(), which the ranks would call again; set BALANCE_MODE=auto"
    try:
        relaunch.program(sys.orig_argv)
    except relaunch.Unrepeatable as error:
        return str(error)
    return ""


def _cannot_partition(model: Any, usable: tuple[Device, ...]) -> str:
    """Return why ZeRO-3 cannot train `model` here; "" if it can."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "quantization_config", None) or hasattr(model, "hf_quantizer"):
        return zero_support.sentence("quantized", cls=name)
    if simulation.is_active():
        return "ZeRO-3 does not run on simulated devices"
    if len(usable) != devices.count():
        return f"ZeRO-3 would use all {devices.count()} devices, also those that are left out here"
    try:
        requirements.check()
    except BalanceError as error:
        return str(error).removeprefix("BALANCE_MODE=zero3: ")
    return ""


def _host_memory() -> int | None:
    """Return the bytes of host memory that are free; None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
