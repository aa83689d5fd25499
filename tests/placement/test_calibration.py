"""Costs that are put right by measured peaks: they explain what was measured, and only that changes."""

import pytest

from balance_shim.device import Device
from balance_shim.memory.blocks import Block
from balance_shim.memory.cost import BlockCost
from balance_shim.memory.peak import PLAIN, Schedule
from balance_shim.memory.structure import ModelStructure
from balance_shim.memory.workload import Workload
from balance_shim.placement.calibration import corrected
from balance_shim.placement.costed_model import CostedModel
from balance_shim.placement.plan import evaluate

COST = BlockCost(weights=1000, gradients=1000, optimizer=2000, activations=3000, forward=3500, backward=4000, step=500)
DEVICES = tuple(Device(index, f"npu:{index}", 100_000, 100_000, overhead=64) for index in range(2))
MAP = {"a": 0, "b": 0, "c": 1}


def costed(schedule=PLAIN):
    blocks = tuple(Block(name, "Layer", "layer", (f"{name}.weight",), ()) for name in "abc")
    return CostedModel(ModelStructure("Model", blocks), (COST,) * 3, Workload(), schedule=schedule)


def peaks_with(measured, schedule=PLAIN):
    model = costed(schedule)
    after, devices = corrected(model, model, MAP, DEVICES, measured)
    plan = evaluate("balanced", after, MAP, devices)
    return after, devices, [device.predicted_peak for device in plan.devices]


@pytest.mark.parametrize("schedule", [PLAIN, Schedule(True, True)], ids=["plain", "accumulating"])
@pytest.mark.parametrize("factor", [0.8, 1.5, 3])
def test_the_measured_peaks_are_explained(schedule, factor):
    """More or less than predicted: with the corrected costs the prediction is what was measured."""
    model = costed(schedule)
    before = [device.predicted_peak for device in evaluate("balanced", model, MAP, DEVICES).devices]
    measured = {index: int(factor * size) for index, size in enumerate(before)}
    after, _, peaks = peaks_with(measured, schedule)
    assert peaks == pytest.approx(list(measured.values()), rel=0.02)
    assert all(cost.weights == 1000 and cost.gradients == 1000 and cost.optimizer == 2000 for cost in after.costs)


def test_each_device_has_its_own_factor():
    """What was as predicted stays as it is to the byte."""
    model = costed()
    before = [device.predicted_peak for device in evaluate("balanced", model, MAP, DEVICES).devices]
    after, devices, _ = peaks_with({0: before[0], 1: 2 * before[1]})
    assert after.costs[:2] == model.costs[:2] and devices[0] == DEVICES[0]
    assert after.costs[2].activations > 2 * COST.activations


def test_what_blocks_cannot_explain_stays_with_the_device():
    """Ten times the activations is not believed: the rest is the device's, whichever blocks it holds."""
    after, devices, peaks = peaks_with({0: 95_000, 1: 95_000})
    assert after.costs[2].activations == 10 * COST.activations
    assert devices[1].overhead > DEVICES[1].overhead and peaks[1] == pytest.approx(95_000, rel=0.01)


def test_a_device_without_blocks():
    """There is nothing to scale, and nothing fails."""
    model = costed()
    _, devices = corrected(model, model, {"": 0}, DEVICES, {0: 20_000, 1: 5_000})
    assert devices[1].overhead == 5_000
