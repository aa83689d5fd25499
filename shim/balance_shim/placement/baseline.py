"""The baseline: transformers' own map on the same devices, evaluated with the same costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..device import Device
from ..map_file import OFFLOADED, DeviceMap
from .costed_model import CostedModel
from .places import device_of
from .plan import Plan, evaluate


@dataclass(frozen=True)
class Offload:
    """Blocks that a map keeps off the accelerators, where they cannot be trained.

    Attributes:
        place: "cpu" or "disk".
        device_map: block name -> `place`.
        weights: bytes.
    """

    place: str
    device_map: DeviceMap
    weights: int


@dataclass(frozen=True)
class Baseline:
    """The library's own map, evaluated as ours is."""

    plan: Plan
    offloads: tuple[Offload, ...]

    @property
    def fits(self) -> bool:
        """Whether everything is on an accelerator, and none of them is over its capacity."""
        return not self.offloads and not self.plan.shortfall

    def to_json(self) -> dict[str, Any]:
        written = self.plan.to_json()
        return {
            "fits": self.fits,
            "devices": written["devices"],
            "offloaded": {
                offload.place: {"weights": offload.weights, "blocks": list(offload.device_map)}
                for offload in self.offloads
            },
            "device_map": written["device_map"],
            "step_time": written["step_time"],
        }


def judge(costed: CostedModel, device_map: DeviceMap, devices: Sequence[Device]) -> Baseline:
    """Evaluate `device_map`, which the library made for `devices`."""
    homes = [device_of(block.tensors[0], device_map) for block in costed.blocks]
    offloads = []
    for place in OFFLOADED:
        offloaded = [number for number, first_device in enumerate(homes) if first_device == place]
        if offloaded:
            names: DeviceMap = {costed.blocks[number].name: place for number in offloaded}
            offloads.append(Offload(place, names, sum(costed.costs[number].weights for number in offloaded)))
    alone = costed.with_flights(1, shares_inputs=False)  # what nobody but the shim does
    return Baseline(evaluate("auto", alone, device_map, devices), tuple(offloads))
