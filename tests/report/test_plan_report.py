"""Messages on plans."""

from balance_shim.device import Device
from balance_shim.memory.workload import Workload
from balance_shim.placement.plan import DevicePlan, Plan
from balance_shim.report.plan_report import shortfall_line, summary, worst_devices
from balance_shim.units import GIB, MIB

TERMS = ("weights", "gradients", "optimizer", "activations", "temporary", "overhead")


def plan(*devices):
    """Return a plan of devices (predicted peak, capacity)."""
    planned = [
        DevicePlan(Device(index, f"cuda:{index}", capacity, capacity), {**dict.fromkeys(TERMS, 0), "weights": peak})
        for index, (peak, capacity) in enumerate(devices)
    ]
    return Plan("balanced", "Model", 1, Workload(), tuple(planned), {}, 0)


def test_equal_devices_are_compared_by_size():
    """In one unit."""
    before, after = plan((20 * GIB, 24 * GIB), (9 * GIB, 24 * GIB)), plan((900 * MIB, 24 * GIB), (800 * MIB, 24 * GIB))
    assert worst_devices(after, before) == "0.88 GiB instead of 20.00 GiB"


def test_unequal_devices_are_compared_by_how_full_they_are():
    """6.5 GiB of 24 are less full than 3.4 GiB of 4: sizes alone would look like a step back."""
    before, after = plan((3.4 * GIB, 4 * GIB), (1 * GIB, 24 * GIB)), plan((1 * GIB, 4 * GIB), (6.5 * GIB, 24 * GIB))
    assert worst_devices(after, before) == "27% full (6.5 GiB on cuda:1) instead of 85% (3.4 GiB on cuda:0)"


def test_what_does_not_fit_is_told_in_one_unit():
    """Needed, capacity and what is missing can be added up."""
    line = shortfall_line(plan((24.5 * GIB, 24 * GIB)), [])
    assert "cuda:0 needs 24.50 GiB of 24.00 GiB, 0.50 GiB too much" in line


def test_blocks_of_encoder_and_decoder_are_told_apart():
    """Names are as short as they can be without two modules having the same."""
    held = {"shared": 0, "encoder.embed_tokens": 0, **{f"encoder.block.{number}": 0 for number in range(3)}}
    held |= {"decoder.embed_tokens": 1, "decoder.block.0": 1, "decoder.final_layer_norm": 1, "lm_head": 1}
    assert summary(held, 0) == "shared, encoder.embed_tokens, encoder.block.0-2"
    assert summary(held, 1) == "decoder.embed_tokens, decoder.block.0, final_layer_norm, lm_head"
    assert summary({"model.layers.0": 0, "model.layers.1": 0, "model.norm": 0, "lm_head": 1}, 0) == "layers.0-1, norm"
    assert summary({"": 0}, 0) == "the whole model"
