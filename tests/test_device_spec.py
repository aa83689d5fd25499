"""How people write down a machine."""

import pytest
from hypothesis import given, strategies

from balance_shim.device_rules.kinds import KINDS, kind_named
from balance_shim.device_spec import MOST_DEVICES, SimulationSpec, parse_spec
from balance_shim.units import GIB
from tests import processes

RTX4090, A100, T4 = map(kind_named, ("RTX4090", "A100-40GB", "T4"))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("4x24GiB", SimulationSpec((24 * GIB,) * 4)),
        ("2x80GiB+2x24GiB", SimulationSpec((80 * GIB, 80 * GIB, 24 * GIB, 24 * GIB))),
        ("24GiB", SimulationSpec((24 * GIB,))),
        (" 2 X 1gib + 1.5GiB : Shapes ", SimulationSpec((GIB, GIB, 3 * GIB // 2), shapes_only=True)),
        ("64x1GiB", SimulationSpec((GIB,) * 64)),
        ("4xRTX4090", SimulationSpec((RTX4090.memory,) * 4, kinds=(RTX4090,) * 4)),
        ("rtx 4090", SimulationSpec((RTX4090.memory,), kinds=(RTX4090,))),
        ("2xa100_40gb+1xT4", SimulationSpec((A100.memory, A100.memory, T4.memory), kinds=(A100, A100, T4))),
        ("2x20GiB@rtx-4090+8GiB:shapes", SimulationSpec((20 * GIB,) * 2 + (8 * GIB,), True, (RTX4090, RTX4090, None))),
        ("8xMI300X", SimulationSpec((kind_named("MI300X").memory,) * 8, kinds=(kind_named("MI300X"),) * 8)),
    ],
)
def test_machines_are_read(text, spec):
    """Groups, single devices, spaces and the suffix mean what docs/simulated-devices.md documents."""
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("0x1GiB", "1 to 64"),
        ("65x1GiB", "1 to 64"),
        ("60x1GiB+5x1GiB", "1 to 64"),
        ("4x0GiB", "0gib"),
        ("4x", "size"),
        ("", "size"),
        ("4x1GiB+", "size"),
        ("-1x1GiB", "'-1'"),
        ("1_0x1GiB", "'1_0'"),
        ("axGiB", "'a'"),
        ("4x24GiB:shape", "'shape'"),
        ("4", "1 MiB"),
        ("4xRTX4091", "did you mean RTX4090"),
        ("2xA100", "A100-80GB or A100-40GB"),
        ("4x20GiB@H10", "H100"),
        ("2xquantum", "known: "),
    ],
)
def test_other_texts_are_refused_in_one_line(text, phrase):
    """The message repeats the text, names what is wrong with it, and shows what would be right."""
    with pytest.raises(ValueError, match="4x24GiB") as error:
        parse_spec(text)
    message = str(error.value)
    assert repr(text) in message and phrase in message and "\n" not in message


def test_kinds_are_told_apart_and_bring_an_architecture():
    """Names differ in more than dashes, each row has a source, and devices given by a size alone are like an A100."""
    plain = [kind.name.lower().replace("-", "") for kind in KINDS]
    assert len(set(plain)) == len(plain) and all(kind.source and kind.memory > 4 * GIB for kind in KINDS)
    machine = parse_spec("1GiB+T4+H100+910B+MI300X")
    assert [architecture.capability for architecture in machine.architectures] == [(8, 0), (7, 5), (9, 0), None, (9, 4)]
    assert [architecture.runtime for architecture in machine.architectures] == ["cuda", "cuda", "cuda", "npu", "hip"]


@given(
    strategies.lists(strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 999)), min_size=1, max_size=7)
)
def test_groups_come_in_their_order(groups):
    """Any groups that fit give their devices in the order written."""
    assert sum(count for count, _ in groups) <= MOST_DEVICES
    text = "+".join(f"{count}x{size}GiB" for count, size in groups)
    assert parse_spec(text).capacities == tuple(size * GIB for count, size in groups for _ in range(count))


def test_reading_needs_neither_torch_nor_slow_modules():
    """It happens while arming, so torch, dataclasses and the like stay out."""
    text = """
        import sys
        before = set(sys.modules)
        from balance_shim.device_spec import parse_spec
        from balance_shim import simulation
        parse_spec("2x80GiB+2x24GiB:shapes")
        print(sorted({"torch", "dataclasses", "inspect", "multiprocessing"} & (set(sys.modules) - before)))
    """
    assert processes.output_of(text) == "[]"
