"""Mode `auto`: the user's map where there is one, else the fastest remedy that fits."""

import os
from dataclasses import replace
from typing import Any

from .. import devices, log, state
from ..device import Device
from ..map_file import DeviceMap
from ..patching.guard import attempt
from ..placement import alternatives, placed_models, planner
from ..placement.candidates import Candidate, Choice
from ..placement.model_load import ModelLoad
from ..replicas import rank_device, ranks
from ..report import candidates as report
from ..settings import MODES_OF
from ..zero.launching import relaunch
from . import auto_limits, placing
from .balanced import Balanced
from .device_maps import DeviceMaps
from .shared_devices import SharedDevices
from .user_map import UserMap


class Auto(SharedDevices):
    """Chooses how a model trains, when the first one is about to get a device map."""

    def makes_map(self, device_map: Any) -> bool:
        """Return whether a map is to be made in place of `device_map`."""
        return _maker().makes_map(device_map)

    def training_is_near(self) -> None:
        """Become replicas, if the user asks for a number of them."""
        _maker().training_is_near()

    def has_own_devices(self) -> bool:
        """Return whether no other process trains on the devices that a map would use."""
        return _maker().has_own_devices()

    def device_map_for(self, load: ModelLoad) -> DeviceMap | None:
        """Return the user's map, or that of the fastest remedy that fits; a remedy of several ranks starts them."""
        maker = _maker()
        if isinstance(maker, UserMap):
            log.once("info", "mode auto chooses map: BALANCE_DEVICE_MAP is set")
            return maker.device_map_for(load)
        chosen = None
        if state.settings().replicas != 1:
            log.once("info", "mode auto chooses balanced map: BALANCE_REPLICAS is set")
        elif placed_models.placed_models():
            log.once("info", "mode auto chooses balanced map: it has decided for the first model, which is in use")
        else:
            action, instead = "choosing among the remedies", "the map is balanced"
            chosen = attempt(action, _chosen, load, instead=instead)
        if chosen is not None:
            attempt("becoming several processes", _launch, chosen, instead="the map is balanced")
            if chosen.recomputes:
                state.change(gradient_checkpointing=True)
            if chosen.remedy == "pipeline":
                state.change(pipeline=chosen.count)
            if chosen.remedy == "one_device":
                return _on_one_device(chosen, load)
        return maker.device_map_for(load)


def _maker() -> DeviceMaps:
    return UserMap() if state.settings().device_map is not None else Balanced()


def _chosen(load: ModelLoad) -> Candidate | None:
    """Return the chosen candidate, after the table of all was logged; None where nothing fits."""
    choice = choice_for(load)
    if choice is None:
        return None
    if log.is_first_process():
        text = f"candidates of mode auto:\n{report.candidates_table(choice)}"
        log.info(text, "choice", report.facts(choice))
        log.info(str(report.verdict(choice)))
    return choice.chosen


def choice_for(load: ModelLoad) -> Choice | None:
    """Return the choice for a model that is about to load; None without a device."""
    usable = placing.usable_devices(load)
    if not usable:
        return None
    larger, left_out = devices.without_display_cards(usable, state.settings(), load.max_memory)
    if left_out:
        choice = _choice_among(larger, load)
        if choice.chosen is not None:
            return choice
    return _choice_among(usable, load)


def _choice_among(usable: tuple[Device, ...], load: ModelLoad) -> Choice:
    limits = auto_limits.limits_for(load, usable)
    return alternatives.choice_for(placing.request_for(load, usable), limits, ranks.all_shares)


def _launch(chosen: Candidate) -> None:
    """Become the ranks of a remedy that has several; return for any other."""
    if chosen.remedy == "replicas":
        variables = {"BALANCE_MODE": "balanced", "BALANCE_REPLICAS": str(chosen.count)}
        purpose = "replicas of the model"
    elif chosen.is_zero3:
        variables = {"BALANCE_MODE": "zero3", "BALANCE_OFFLOAD": chosen.offload}
        purpose = "ZeRO-3"
        state.change(offload=chosen.offload)  # which the number of threads depends on
    else:
        return
    if chosen.recomputes:
        variables["BALANCE_GRADIENT_CHECKPOINTING"] = "1"
    unused = _unused_by_ranks(variables["BALANCE_MODE"]) - variables.keys()
    before = {name: os.environ.get(name) for name in (*variables, *unused)}
    os.environ.update(variables)
    for name in unused:
        os.environ.pop(name, None)
    try:
        relaunch.become(chosen.count, purpose)
    except relaunch.Unrepeatable as error:
        log.warning(f"{report.name_of(chosen)} cannot be started: {error}; the map is balanced")
    finally:  # whatever went wrong: the environment is the program's again
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _unused_by_ranks(mode: str) -> set[str]:
    """Return the variables that ranks in `mode` must not have: their mode, or this one, does not take them.

    With `BALANCE_STRICT` a variable of another mode stops the program; and one that was reported as ignored has to be.
    """
    return {name for name, modes in MODES_OF.items() if mode not in modes or "auto" not in modes}


def _on_one_device(chosen: Candidate, load: ModelLoad) -> DeviceMap | None:
    """Return the map of a model that stays on one device; None where a single device leaves nothing to decide."""
    request = chosen.request
    if request is None or len(placing.usable_devices(load)) < 2:
        return None
    plan = planner.balanced(request)
    if plan is None:
        return None
    device = request.devices[0]
    plan, device_map = placing.put_in_force(plan, request, replace(load, max_memory={device.index: device.available}))
    rank_device.adopt(device.index)
    return device_map
