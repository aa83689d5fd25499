"""BALANCE_PRECISION on machines whose devices differ."""

from types import SimpleNamespace

import pytest
import torch

from balance_shim import devices, state
from balance_shim.settings import Settings
from balance_shim.training import precision
from balance_shim.units import GIB


@pytest.mark.parametrize(
    ("capabilities", "totals", "max_memory", "expected"),
    [([(8, 0), (8, 0)], [40, 40], None, True),
     ([(8, 0), (7, 0)], [40, 16], None, False),
     ([(8, 0), (7, 0)], [40, 16], {1: 0}, True),
     ([(8, 0), (7, 5)], [40, 2], None, True)],
    ids=["two A100", "A100 and V100", "V100 excluded", "A100 and a display card"],
)  # fmt: skip
def test_bf16_is_asked_of_all_devices_that_train(monkeypatch, capabilities, totals, max_memory, expected):
    """torch answers for the current device only, so a V100 behind an A100 would multiply by emulation."""
    properties = [
        SimpleNamespace(major=major, minor=minor, name="card", total_memory=total * GIB)
        for (major, minor), total in zip(capabilities, totals, strict=True)
    ]
    module = SimpleNamespace(
        device_count=lambda: 2,
        get_device_properties=lambda index: properties[index],
        get_device_capability=lambda index: capabilities[index],
        is_bf16_supported=lambda including_emulation=True: True,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(state, "settings", lambda: Settings(max_memory=max_memory))
    assert precision.could_halve() is expected
