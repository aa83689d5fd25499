"""Mode `auto`: `map` where there is a map, else `balanced`."""

from typing import Any

from .. import log, state
from ..map_file import DeviceMap
from ..placement.model_load import ModelLoad
from .balanced import Balanced
from .device_maps import DeviceMaps
from .shared_devices import SharedDevices
from .user_map import UserMap


class Auto(SharedDevices):
    """Chooses how a model gets its map."""

    def makes_map(self, device_map: Any) -> bool:
        """Return whether a map is to be made in place of `device_map`."""
        return _choice().makes_map(device_map)

    def training_is_near(self) -> None:
        """Become replicas, if the mode that was chosen trains some."""
        _choice().training_is_near()

    def has_own_devices(self) -> bool:
        """Return whether no other process trains on the devices that a map would use."""
        return _choice().has_own_devices()

    def device_map_for(self, load: ModelLoad) -> DeviceMap | None:
        """Return the map of the mode that was chosen, with a line on the choice."""
        chosen = _choice()
        name, why = ("balanced", "no map was given")
        if isinstance(chosen, UserMap):
            name, why = ("map", "BALANCE_DEVICE_MAP is set")
        log.once("info", f"mode auto chooses {name}: {why}")
        return chosen.device_map_for(load)


def _choice() -> DeviceMaps:
    return UserMap() if state.settings().device_map is not None else Balanced()
