"""The inventory: which devices of a machine a map may use."""

from types import SimpleNamespace

from balance_shim import devices
from balance_shim.settings import Settings
from balance_shim.units import GIB, MIB


def test_a_device_that_the_runtime_alone_would_fill_is_left_out(monkeypatch):
    """Somebody else fills the first device: what it has left is not enough for a context, let alone for layers."""
    free = [40 * MIB, 20 * GIB, 20 * GIB]
    module = SimpleNamespace(device_count=lambda: 3, mem_get_info=lambda index: (free[index], 24 * GIB))
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(devices, "_module", lambda kind: module)
    assert [device.index for device in devices.inventory(Settings())] == [1, 2]
