"""Programs on four simulated devices of a known kind, and the time that the clock gives them."""

import contextlib
import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn

from balance_shim import simulation
from balance_shim.device import describe
from balance_shim.device_rules.kinds import kind_named
from balance_shim.doctor import measuring
from balance_shim.settings import Settings
from balance_shim.timing.clock import origin_of
from balance_shim.timing.measured import Measured, rates_for, write
from tests.simulation.child import main

simulation.install(simulation.parse_spec("4xRTX4090:shapes"))

DEVICES = [torch.device("npu", index) for index in range(4)]
WIDTH, LAYERS, ROWS = 16384, 8, 4096
CLOCK = simulation.clock()
RATES = CLOCK.devices[0]
PRODUCT = 2 * ROWS * WIDTH * WIDTH / RATES.bfloat16  # seconds of a layer: long, so that the host is not the bound


def _passed(run):
    """Return how long `run` takes by the clock."""
    CLOCK.synchronize()
    before = CLOCK.reading()
    run()
    return CLOCK.reading().since(before)


def _chain():
    return [
        [nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=torch.bfloat16) for _ in range(LAYERS)]
        for device in DEVICES
    ]


def _batch():
    return torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device=DEVICES[0])


def check_one_device_computes_at_its_peak():
    """Matrix products take their FLOPs over the peak rate, forward and backward; the device is busy throughout."""
    layers, batch = nn.Sequential(*_chain()[0]), _batch().requires_grad_()
    taken = _passed(lambda: layers(batch).sum().backward())
    assert abs(taken.now / (3 * LAYERS * PRODUCT) - 1) < 0.02, taken
    assert taken.busy[0] > 0.99 * taken.now and not any(taken.busy[1:]) and taken.bound == "devices"


def check_micro_batches_overlap_where_copies_wait_for_events_only():
    """Copies on streams of their own leave N*m/(m+N-1); nothing else is between the stages."""
    stages, count = _chain(), 8
    streams = {(device, way): torch.npu.Stream(device) for device in DEVICES for way in ("in", "out")}

    def run():
        for _ in range(count):
            hidden = _batch()
            for stage, (source, target) in zip(stages, itertools.pairwise([DEVICES[0], *DEVICES]), strict=True):
                if source != target:
                    out, into = streams[source, "out"], streams[target, "in"]
                    out.wait_stream(torch.npu.current_stream(source))
                    with torch.npu.stream(out), torch.npu.stream(into):
                        hidden = hidden.to(target)
                    torch.npu.current_stream(target).wait_stream(into)
                for layer in stage:
                    hidden = layer(hidden)

    with torch.no_grad():
        taken = _passed(run)
    speedup = count * len(DEVICES) * LAYERS * PRODUCT / taken.now
    ideal = len(DEVICES) * count / (count + len(DEVICES) - 1)
    assert abs(speedup / ideal - 1) < 0.05, (speedup, ideal)


def check_copies_per_layer_from_the_first_device_leave_no_overlap():
    """As accelerate's hooks bring a mask to each layer: a barrier each, so that it is as slow as one device."""
    stages, mask = _chain(), torch.zeros(8, device=DEVICES[0])

    def run():
        for _ in range(8):
            hidden = _batch()
            for stage, device in zip(stages, DEVICES, strict=True):
                hidden = hidden.to(device)
                for layer in stage:
                    mask.to(device)
                    hidden = layer(hidden)

    with torch.no_grad():
        taken = _passed(run)
    speedup = 8 * len(DEVICES) * LAYERS * PRODUCT / taken.now
    assert 0.95 < speedup < 1.15, speedup  # one layer of eight may overlap at each boundary
    assert taken.bound == "one device at a time"


def check_reading_a_value_stops_overlap():
    """A program that looks at each stage's result leaves the other devices idle."""
    stages = _chain()

    def run(reads):
        for stage, device in zip(stages, DEVICES, strict=True):
            hidden = _batch().to(device) if device == DEVICES[0] else torch.zeros_like(_batch(), device=device)
            for layer in stage:
                hidden = layer(hidden)
            with contextlib.suppress(ValueError):
                _ = hidden.sum().item() if reads else None

    with torch.no_grad():
        together, apart = _passed(lambda: run(False)), _passed(lambda: run(True))
    assert together.now < 1.1 * LAYERS * PRODUCT and apart.now > 3.9 * LAYERS * PRODUCT


def check_events_have_times():
    """`elapsed_time` is what the clock says, in milliseconds."""
    layer, batch = _chain()[0][0], _batch()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    torch.npu.synchronize()
    start.record()
    with torch.no_grad():
        layer(batch)
    end.record()
    assert abs(start.elapsed_time(end) / (PRODUCT * 1e3) - 1) < 0.05


def check_the_time_of_a_step_is_kept():
    """The second of two steps of an optimizer; each of its operations moves bytes."""
    layer, batch = _chain()[0][0], _batch()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    step = simulation.step_time()
    update = 3 * WIDTH * WIDTH * 2 / RATES.memory  # read weight and gradient, write the weight
    assert abs(step.seconds / (2 * PRODUCT + update) - 1) < 0.1, (step, PRODUCT, update)
    assert step.busy[0] > 0.95 and step.bound == "devices" and step.rates == "data sheet"


def check_measured_rates_are_those_of_the_devices():
    """`doctor --measure` finds what the devices do, and from then on its figures win over the table of kinds."""
    with tempfile.TemporaryDirectory() as folder:
        read = Settings(cache=folder)
        section = measuring.measure(read)
        assert not section.problems and "RTX 4090" in section.text, section
        product = torch.npu.get_device_name(0)
        measured = rates_for(product, kind_named("RTX4090"), Path(folder))
        for name in ("float16", "bfloat16", "float32", "memory", "link_bytes", "host_bytes"):
            assert abs(getattr(measured, name) / getattr(RATES, name) - 1) < 0.1, (name, measured, RATES)
        assert measured.measured and measured != RATES
        device = describe(0, "cuda:0", 2**34, read, kind=kind_named("RTX4090"))
        assert device.rates == measured and origin_of([device.rates]) == "measured"
        write(Path(folder), {"a card of tomorrow": Measured(1e15, 1e15, 1e14, 1e13, host_bytes=6e10)})
        assert rates_for("a card of tomorrow", None, Path(folder)).float16 == 1e15
        assert rates_for(product, kind_named("RTX4090"), Path(folder)) == measured, "others stay"


if __name__ == "__main__":
    main(globals())
