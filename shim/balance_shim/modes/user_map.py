"""Mode `map`: the user's own map, checked against the model before any weight is read."""

from typing import Any

from .. import cache, devices, log, state
from ..map_file import DeviceMap
from ..placement import colocations, planner
from ..placement.model_load import ModelLoad
from . import placing
from .device_maps import DeviceMaps, is_covered


class UserMap(DeviceMaps):
    """Replaces "auto" and its like by `BALANCE_DEVICE_MAP`."""

    def makes_map(self, device_map: Any) -> bool:
        """Return whether the user's map is used in place of `device_map`."""
        if isinstance(device_map, str) and not is_covered(device_map):
            log.once(
                "warning",
                f"the script loads with device_map={device_map!r}, which BALANCE_INTERCEPT leaves alone: "
                "BALANCE_DEVICE_MAP is not used for this model",
            )
        return super().makes_map(device_map)

    def device_map_for(self, load: ModelLoad) -> DeviceMap | None:
        """Return the user's map, completed where that is safe.

        Raises:
            DeviceMapError: the map does not suit the model.
        """
        settings = state.settings()
        assert settings.device_map is not None, "settings without a map in mode map are fatal"
        usable = placing.usable_devices(load)
        colocations.recall(load.model, cache.folder_of(settings.cache))
        request = placing.request_for(load, usable)
        plan = planner.from_user(request, settings.device_map, devices.count())
        for note in plan.notes:
            log.info(note)
        return placing.put_in_force(plan, request, load)[1]
