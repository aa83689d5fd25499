"""Why memory grows, on made-up records of steps."""

import random

import pytest

from balance_shim.monitoring.diagnosis import Growth, Step
from balance_shim.monitoring.readings import Reading

GIB = 1 << 30
MIB = 1 << 20
TOTAL = 24 * GIB


def findings(steps, devices=1, start=None, total=TOTAL, exact=True):
    """Return what `Growth` finds in `steps`, each a dict of a device's figures or of the batch's."""
    growth = Growth([f"npu:{index}" for index in range(devices)], [total] * devices, lambda: exact)
    reported = growth.start(start or [Reading(0, 0, 0, 0)] * devices)
    for number, step in enumerate(steps, 1):
        figures = {"allocated": 4 * GIB, "peak": 8 * GIB, "size": 4096, "others": 0, "between": None, **step}
        reserved = figures.get("reserved", figures["peak"] + MIB)
        reading = Reading(figures["allocated"], reserved, figures["peak"], figures["others"])
        size = figures["size"]
        between = figures["between"] and (figures["between"],) * devices
        reported += growth.add(Step(number, size, size // 2, size * 8, (reading,) * devices, between))
    return reported


def test_tensors_kept_alive():
    """A floor that rises step by step is found once, with the step where it began, its rate and all devices."""
    leak = [{"allocated": 4 * GIB + 100 * MIB * max(0, number - 20)} for number in range(1, 80)]
    (finding,) = findings(leak, devices=2)
    assert finding.kind == "kept" and finding.step == 21 and finding.devices == (0, 1)
    assert finding.rate == pytest.approx(100 * MIB)
    assert "100.0 MiB per step" in finding.text and "full at about step" in finding.text


def test_one_very_long_batch():
    """A batch many times as large as all before, that takes a device to a new height, is named with its step."""
    steps = [{}] * 11 + [{"size": 40960, "peak": 20 * GIB}] + [{}] * 10
    (finding,) = findings(steps)
    assert (
        finding.kind == "long batch"
        and finding.step == 12
        and "10.0 times" in finding.text
        and "20480 tokens" in finding.text
    )


def test_batches_that_get_longer_until_a_device_is_full():
    """Only when a device is almost full; the batches are named as the reason, and nothing is said to be kept."""
    steps = [{"size": 4096 + 100 * number, "peak": 8 * GIB + number * GIB // 8} for number in range(120)]
    (finding,) = findings(steps)
    assert finding.kind == "longer batches" and "because batches grew" in finding.text
    assert findings(steps[:80]) == []


def test_fragmentation():
    """Reserved memory that grows while no peak does is fragmentation, and its remedy is named."""
    steps = [{"reserved": 8 * GIB + max(0, number - 30) * 100 * MIB} for number in range(120)]
    (finding,) = findings(steps)
    assert finding.kind == "fragmentation" and "expandable_segments" in finding.text
    assert finding.step == pytest.approx(31, abs=3)


def test_a_cache_that_is_not_cleared():
    """What an evaluation needed and the allocator still has is named where little is free, and only there."""
    after = [{"reserved": 23 * GIB, "between": 23 * GIB}, *[{"reserved": 23 * GIB}] * 30]
    (finding,) = findings([*[{}] * 5, *after])
    assert finding.kind == "cache" and finding.step == 6
    assert findings([*[{}] * 5, *[{"reserved": 16 * GIB, "between": 16 * GIB}] * 30]) == []


def test_others_on_the_device():
    """A device that starts half full, and a process that comes later, are told apart; our own context is neither."""
    (finding,) = findings([{"others": 12 * GIB}] * 20, start=[Reading(0, 0, 0, 12 * GIB)])
    assert finding.kind == "occupied" and "starts 50% full" in finding.text
    (finding,) = findings([{"others": 0}] * 9 + [{"others": None}] + [{"others": 3 * GIB}] * 10)
    assert finding.kind == "others" and finding.step == 11 and "3.0 GiB" in finding.text
    assert findings([{"others": 600 * MIB}] * 20) == []


def test_what_cuda_may_have_taken_itself_is_no_alarm_on_a_small_card():
    """Kernels and communication buffers of our own look like others' where nothing tells them apart."""
    card = {"total": 10 * GIB, "exact": False}
    before = [{"others": 0}] * 9
    assert findings([*before, *[{"others": 800 * MIB}] * 10], **card) == []
    (finding,) = findings([*before, *[{"others": 2 * GIB}] * 10], **card)
    assert "other processes (or CUDA itself) took 2.0 GiB" in finding.text
    (finding,) = findings([*before, *[{"others": 800 * MIB}] * 10], total=10 * GIB)
    assert "other processes took" in finding.text


def healthy(seed):
    """Yield the steps of a healthy run on a caching allocator: varied lengths, late state, evaluations, slack."""
    rng = random.Random(seed)
    late, every = rng.randrange(1, 5), rng.choice((0, 10, 25))
    longest = rng.choice((512, 2048, 8192))
    spread = rng.choice((rng.uniform, lambda low, high: min(high, low + rng.expovariate(6 / (high - low)))))
    highest = 0
    for number in range(1, 300):
        size = int(spread(longest / 16, longest))
        peak = 6 * GIB + size * MIB
        evaluated = every and number % every == 1 and number > 1
        between = 6 * GIB + longest * MIB // 2 if evaluated else None
        highest = max(highest, peak, between or 0)
        yield {
            "allocated": (3 * GIB if number < late else 6 * GIB) + size * 8 + rng.randrange(8) * 512,
            "size": size,
            "peak": peak,
            "reserved": int(highest * 1.04) + rng.randrange(4) * 20 * MIB,
            "others": 500 * MIB if rng.random() < 0.8 else None,
            "between": between,
        }


def test_no_alarm_on_healthy_records():
    """A hundred made-up healthy records give not one finding."""
    alarms = {seed: alarm_findings for seed in range(100) if (alarm_findings := findings(healthy(seed)))}
    assert not alarms
