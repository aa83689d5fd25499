"""Every variable: what it takes, and the one line that a bad value gives."""

import pytest

from balance_shim import settings
from balance_shim.optimizers import OPTIMIZERS
from balance_shim.units import GIB

BAD_VALUES = {
    "BALANCE_MODE": ["balancd", "1", "zero-3", "balanced,map"],
    "BALANCE_INTERCEPT": ["all", "auto,,", "auto;balanced", "cuda:0"],
    "BALANCE_DEVICE_MAP": ["/does/not/exist.json", "{", '{"a": true}'],
    "BALANCE_MAX_MEMORY": [
        "much", "0=", "0=20GiB,0=30GiB", "x=1GiB", "-1=1GiB", "{bad", "[1]", '{"0": []}', "20GiB,30GiB", "{}",
        "foo bar:1=2GiB", '{"0": "1GiB", "0": "2GiB"}', '{"a":' * 20_000,
    ],
    "BALANCE_RESERVE": ["x", "100%", "-5%", "%", "nan%", "-1GiB"],
    "BALANCE_BATCH_SIZE": ["0", "-1", "1.5", "two", "1e3", "99999999999"],
    "BALANCE_SEQ_LEN": ["0", "2k", "-7"],
    "BALANCE_TUNING": ["qlora-ish", "none"],
    "BALANCE_OPTIMIZER": ["adam", "my_optimizer"],
    "BALANCE_PRECISION": ["16", "float16", "fp8"],
    "BALANCE_MICRO_BATCH": ["0", "-2", "half", "1.5"],
    "BALANCE_GRADIENT_CHECKPOINTING": ["2", "some"],
    "BALANCE_MONITOR": ["maybe", "2", "all"],
    "BALANCE_REBALANCE": ["twice", "2"],
    "BALANCE_LOSS": ["chunks", "1"],
    "BALANCE_REPLICAS": ["0", "all", "-1", "1.5"],
    "BALANCE_PIPELINE": ["0", "on", "-1", "2.5"],
    "BALANCE_ZERO_CONFIG": [
        "/no/ds.json", "{1}", "[]", '{"zero_optimization": {"stage": 2}}', '{"zero_optimization": 3}',
    ],
    "BALANCE_OFFLOAD": ["cpu", "nvme"],
    "BALANCE_NPROC": ["0", "gpu", "-1"],
    "BALANCE_NCCL_TIMEOUT": ["0", "30m", "1.5"],
    "BALANCE_REPORT": ["/dev/null/folder/x", "/etc/hostname", "1", "true"],
    "BALANCE_SIMULATE": ["4", "0x1GiB", "4x", "x24GiB", "100x1GiB", "4x24GiB:sizes", "+"],
    "BALANCE_CACHE": ["/etc/hostname", "1", "yes"],
    "BALANCE_STRICT": ["maybe", "2"],
    "BALANCE_LANG": ["fr", "zh_CN", "1"],
    "BALANCE_LOG_LEVEL": ["loud", "5"],
}  # fmt: skip


def environ_for(name, value):
    """The variable in the environment, with the mode that it is for."""
    return {name: value} | ({"BALANCE_MODE": "zero3"} if name in settings.ZERO_VARIABLES else {})


def test_each_variable_has_its_bad_values_tried():
    """A variable that is added comes with its bad values."""
    assert list(BAD_VALUES) == [variable.name for variable in settings.VARIABLES]


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}-{value[:40]}") for name, values in BAD_VALUES.items() for value in values],
)
def test_a_bad_value_gives_one_line_and_leaves_the_default(name, value):
    """The line names the variable, and says what is allowed and what happens now."""
    read, problems = settings.read(environ_for(name, value))
    assert [problem.variable for problem in problems] == [name]
    message = problems[0].message
    assert message.startswith(name) and "\n" not in message and ";" in message
    expected = settings.Settings()
    if name == "BALANCE_MODE":
        expected = expected._replace(mode="off")
    if name == "BALANCE_DEVICE_MAP":
        expected = expected._replace(mode="map")
    if name in settings.ZERO_VARIABLES:
        expected = expected._replace(mode="zero3")
    assert read == expected


@pytest.mark.parametrize(("name", "value"), [(name, values[0]) for name, values in BAD_VALUES.items()])
def test_strict_makes_every_problem_fatal(name, value):
    """Without BALANCE_STRICT only a request that would be ignored silently is fatal."""
    environ = environ_for(name, value)
    _, problems = settings.read(environ)
    assert problems[0].fatal == (name in ("BALANCE_DEVICE_MAP", "BALANCE_SIMULATE", "BALANCE_ZERO_CONFIG"))
    if name != "BALANCE_STRICT":
        _, problems = settings.read({**environ, "BALANCE_STRICT": "1"})
        assert problems[0].fatal and "using the default" not in problems[0].message


@pytest.mark.parametrize(
    ("environ", "field", "value"),
    [
        ({"BALANCE_MODE": "AUTO"}, "mode", "auto"),
        ({"BALANCE_MODE": "  "}, "mode", "balanced"),
        ({"BALANCE_INTERCEPT": "auto, none"}, "intercept", frozenset({"auto", "none"})),
        ({"BALANCE_MAX_MEMORY": "20GiB"}, "max_memory", 20 * GIB),
        ({"BALANCE_MAX_MEMORY": "0=20GiB,cuda:1=45GiB"}, "max_memory", {0: 20 * GIB, 1: 45 * GIB}),
        ({"BALANCE_MAX_MEMORY": '{"0": "20GiB", "1": 1073741824, "cpu": "9GiB"}'}, "max_memory", {0: 20 * GIB, 1: GIB}),
        ({"BALANCE_MAX_MEMORY": "cpu=10GiB"}, "max_memory", None),
        ({"BALANCE_RESERVE": "2GiB"}, "reserve", settings.Reserve(fixed=2 * GIB)),
        ({"BALANCE_RESERVE": "10%"}, "reserve", settings.Reserve(fraction=0.1)),
        ({"BALANCE_RESERVE": "0"}, "reserve", settings.Reserve()),
        ({"BALANCE_SEQ_LEN": "4096"}, "seq_len", 4096),
        ({"BALANCE_GRADIENT_CHECKPOINTING": "1"}, "gradient_checkpointing", True),
        ({"BALANCE_GRADIENT_CHECKPOINTING": "Auto"}, "gradient_checkpointing", "auto"),
        ({"BALANCE_LOSS": "Chunked"}, "loss", "chunked"),
        ({"BALANCE_CACHE": "off"}, "cache", None),
        ({"BALANCE_CACHE": "0"}, "cache", None),
        ({"BALANCE_REPORT": "false"}, "report", "off"),
        ({"BALANCE_CACHE": "/tmp/plans"}, "cache", "/tmp/plans"),
        ({"BALANCE_STRICT": "yes"}, "strict", True),
        ({"BALANCE_REPORT": "OFF"}, "report", "off"),
    ],
)
def test_values_are_read(environ, field, value):
    """Each form that the documents show."""
    read, problems = settings.read(environ)
    assert getattr(read, field) == value and not problems


def test_a_map_alone_implies_mode_map():
    """BALANCE_DEVICE_MAP without a mode, with one that contradicts it, and a mode without a map."""
    read, problems = settings.read({"BALANCE_DEVICE_MAP": '{"": 0}'}, default_mode="off")
    assert read.mode == "map" and read.device_map.entries == {"": 0} and not problems
    for unused in ('{"": 0}', "/does/not/exist"):
        read, problems = settings.read({"BALANCE_DEVICE_MAP": unused, "BALANCE_MODE": "balanced"})
        assert read.mode == "balanced" and read.device_map is None
        assert len(problems) == 1 and "not used" in problems[0].message and not problems[0].fatal
    _, problems = settings.read({"BALANCE_MODE": "map"})
    assert "needs BALANCE_DEVICE_MAP" in problems[0].message and problems[0].fatal


def test_misspelled_names_are_noticed_and_foreign_ones_are_not():
    """Other programs have variables that start with BALANCE_, too."""
    _, problems = settings.read({"BALANCE_MAXMEMORY": "20GiB", "BALANCE_SHEET_PATH": "/tmp"})
    assert [problem.variable for problem in problems] == ["BALANCE_MAXMEMORY"]
    assert "did you mean BALANCE_MAX_MEMORY?" in problems[0].message


def test_cuda_devices_keep_a_least_reserve():
    """8 % where that is more, on smaller cards 768 MiB, on tiny ones a fifth; simulated ones keep no more."""
    reserve = settings.Settings().reserve
    sizes = (80 * GIB, 12 * GIB, 6 * GIB, 2 * GIB, GIB)
    expected = [int(0.08 * 80 * GIB), int(0.08 * 12 * GIB), 768 * 2**20, int(0.2 * 2 * GIB), int(0.08 * GIB)]
    assert [reserve.of(size, has_runtime=True) for size in sizes] == expected
    assert [reserve.of(size) for size in sizes] == [int(0.08 * size) for size in sizes]
    assert settings.Reserve(fraction=0.08).of(2 * GIB, has_runtime=True) == int(0.08 * 2 * GIB)


def test_reserve_is_taken_from_the_capacity():
    """A percentage is of the device, a size is the same on each, and neither exceeds the device."""
    assert settings.Reserve(fraction=0.1).of(1000) == 100
    assert settings.Reserve(fixed=300).of(1000) == 300 and settings.Reserve(fixed=3000).of(1000) == 1000


@pytest.mark.parametrize(
    ("name", "only", "mode"),
    [
        *((name, "zero3", "balanced") for name in settings.ZERO_VARIABLES),
        ("BALANCE_REPLICAS", "balanced or auto", "zero3"),
    ],
)
def test_variables_of_another_mode_are_said_to_be_ignored(name, only, mode):
    """They would change nothing, which who sets them should know; they are not even read."""
    read, problems = settings.read({name: "2", "BALANCE_MODE": mode})
    assert read == settings.Settings(mode=mode)
    assert [problem.message for problem in problems] == [f"{name} is for BALANCE_MODE={only} only; it is ignored"]


def test_every_optimizer_of_the_memory_model_is_accepted():
    """There is one list: what plans know can be asked for, and what can be asked for is known."""
    for name in OPTIMIZERS:
        read, problems = settings.read({"BALANCE_OPTIMIZER": name})
        assert read.optimizer == name and not problems
    assert settings.read({"BALANCE_OPTIMIZER": "adamw_of_tomorrow"})[1]
