"""The clock: when operations start and end by CUDA's rules."""

import json

import pytest

from balance_shim.device_rules.kinds import kind_named, kind_of_product
from balance_shim.timing import measured
from balance_shim.timing.clock import Clock, step_time
from balance_shim.timing.rates import HostRates, Operation, rates_of

IDLE_HOST = HostRates(launch=0, view=0, hook=0, copy=0)
H100 = rates_of(kind_named("H100"))
TFLOP = Operation(flops=10**12, precision="bfloat16")
SECONDS = H100.seconds(TFLOP)


def test_one_device_computes_at_its_peak():
    """FLOPs over the peak rate, and bytes over the bandwidth where those take longer."""
    clock = Clock([H100], IDLE_HOST)
    for _ in range(10):
        clock.launch(0, TFLOP)
    assert clock.now == pytest.approx(10**13 / 989.4e12)
    clock.launch(0, Operation(moved=3350 * 10**9))
    assert clock.now == pytest.approx(10**13 / 989.4e12 + 1)


def test_the_host_is_the_bound_of_small_operations():
    """Launches take as long as they take, whatever the device does."""
    clock = Clock([H100], HostRates(launch=1e-5))
    for _ in range(1000):
        clock.launch(0, Operation(moved=8))
    taken = clock.reading()
    assert taken.now == pytest.approx(1e-2, rel=0.01)
    assert taken.bound == "host"


@pytest.mark.parametrize(("devices", "batches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
@pytest.mark.parametrize("copies", ["events", "hooks"])
def test_a_chain_of_equal_stages(devices, batches, copies):
    """With copies that wait for events only, N*m/(m+N-1); with hooks that copy from the first device per layer, 1."""
    clock, layers = Clock([H100] * devices, IDLE_HOST), 24
    outgoing = [clock.new_stream(device) for device in range(devices)]
    incoming = [clock.new_stream(device) for device in range(devices)]
    for _ in range(batches):
        for device in range(devices):
            if device and copies == "events":
                clock.wait(device - 1, clock.record(device - 1), outgoing[device - 1])
                clock.copy(device - 1, device, 2**20, outgoing[device - 1], incoming[device])
                clock.wait(device, clock.record(device, incoming[device]))
            for _ in range(layers):
                if device and copies == "hooks":
                    clock.copy(0, device, 2**10)
                clock.launch(device, TFLOP)
    speedup = batches * devices * layers * SECONDS / clock.now
    ideal = devices * batches / (batches + devices - 1) if copies == "events" else 1
    assert speedup == pytest.approx(ideal, rel=0.05)
    busy = step_time(clock.reading(), 0, clock.devices).busy
    assert busy == pytest.approx([speedup / devices] * devices, rel=0.05)


def test_reading_a_value_makes_the_host_wait():
    """What is launched after `.item()` cannot overlap with what was launched before it."""
    clock = Clock([H100] * 2, IDLE_HOST)
    clock.launch(0, TFLOP)
    clock.to_host(0, 4)
    clock.launch(1, TFLOP)
    assert clock.now == pytest.approx(2 * SECONDS)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Tesla T4", "T4"),
        ("Ascend910B3", "910B"),
    ],
)
def test_kinds_are_recognised_by_the_name_of_the_driver(product, name):
    """The whole name: relatives of a card have other rates."""
    kind = kind_of_product(product)
    assert (kind and kind.name) == name


@pytest.mark.parametrize(
    "stored", ["{", "[]", '{"X": -5}', '{"X": {"memory": -1, "launch": NaN}}', '{"X": {"memory": "fast", "new": 1}}']
)
def test_a_damaged_store_of_measured_rates_is_as_good_as_none(tmp_path, stored):
    """Nothing in it can turn the rates of the table into what is no rate; good figures next to bad ones count."""
    kind = kind_named("RTX4090")
    (tmp_path / measured.FILE).write_text(stored.replace("X", kind.product), encoding="utf-8")
    assert measured.rates_for(kind.product, kind, tmp_path) == rates_of(kind)
    mended = {"A": 3, kind.product: {"float16": 1e14, "memory": -1}}
    (tmp_path / measured.FILE).write_text(json.dumps(mended), encoding="utf-8")
    measured._read.cache_clear()
    rates = measured.rates_for(kind.product, kind, tmp_path)
    assert (rates.float16, rates.memory, rates.measured) == (1e14, kind.rates.memory, True)
