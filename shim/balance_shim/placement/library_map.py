"""The map that transformers would make for a model that is loaded already: accelerate's, with its own rule."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..device import Device
from ..map_file import OFFLOADED, DeviceMap

if TYPE_CHECKING:
    from torch import nn


def library_map(model: "nn.Module", devices: Sequence[Device]) -> DeviceMap | None:
    """Return the map of `device_map="auto"` for these devices' capacities; None where it needs the host or the disk.

    As in `transformers.modeling_utils`, which balances the sizes of weights and then fills device by device.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    no_split = list(getattr(model, "_no_split_modules", None) or ())
    room = {device.index: device.available for device in devices}
    balanced = get_balanced_memory(model, max_memory=room, no_split_module_classes=no_split)
    device_map: DeviceMap = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=no_split)
    return None if any(place in OFFLOADED for place in device_map.values()) else device_map
