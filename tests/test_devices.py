"""The inventory: which devices of a machine a map may use, and how much of each."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance_shim import devices, eligible_devices, log
from balance_shim.device import Device, levelled
from balance_shim.device_rules.kinds import Architecture
from balance_shim.device_rules.overhead import overhead_of
from balance_shim.settings import Settings, read
from balance_shim.units import GIB, MIB


class FakeCuda:
    """Stands in for `torch.cuda`, which has no devices here; notes which devices are asked for their memory.

    `free` holds bytes, or the error that asking a device raises.
    """

    def __init__(self, free, capabilities=None, totals=None, built=(), **more):
        self.free, self.built, self.asked = free, built, []
        self.capabilities = capabilities or [(8, 0)] * len(free)
        self.totals = totals or [24 * GIB] * len(free)
        vars(self).update(more)

    def device_count(self):
        return len(self.free)

    def get_arch_list(self):
        return list(self.built)

    def get_device_properties(self, index):
        major, minor = self.capabilities[index]
        return SimpleNamespace(major=major, minor=minor, name=f"card {index}", total_memory=self.totals[index])

    def mem_get_info(self, index):
        self.asked.append(index)
        if isinstance(self.free[index], Exception):
            raise self.free[index]
        return self.free[index], self.totals[index]


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes `torch.cuda` look like a machine, and returns it."""

    def made(*args, **kwargs):
        module = FakeCuda(*args, **kwargs)
        monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
        monkeypatch.setattr(devices, "_module", lambda kind: module)
        return module

    return made


@pytest.fixture
def lines(monkeypatch):
    """The lines that are logged once."""
    messages = []
    monkeypatch.setattr(log, "once", lambda level, text: messages.append(text))
    return messages


def indices(*args, **kwargs):
    return [device.index for device in devices.inventory(*args, **kwargs)]


def test_a_device_that_the_runtime_alone_would_fill_is_left_out(machine):
    """Somebody else fills the first device: what it has left is not enough for workspaces, let alone for layers."""
    machine([0, 20 * GIB, 20 * GIB])
    assert indices(Settings()) == [1, 2]


def test_a_device_that_cannot_be_asked_is_left_out_alone(machine, lines):
    """A full device refuses the context that the question needs; the others are used, and one line names it."""
    full = RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
    machine([20 * GIB, full, 20 * GIB])
    assert indices(Settings()) == [0, 2]
    assert lines == ["cuda:1 is not used, because querying its memory failed: CUDA error: out of memory"]


def test_excluded_devices_are_not_asked(machine):
    """Neither those that the script's max_memory leaves out, nor caps of 0, nor those that do not matter."""
    module = machine([20 * GIB] * 4)
    assert indices(Settings(), {0: "9GiB", 2: 0, 3: "9GiB"}) == [0, 3] and module.asked == [0, 3]
    module.asked.clear()
    settings, problems = read({"BALANCE_MAX_MEMORY": "0=0,1=0"})
    assert problems == () and indices(settings) == [2, 3] and module.asked == [2, 3]
    module.asked.clear()
    assert indices(Settings(), only={1}) == [1] and module.asked == [1]


def test_the_allocators_own_limit_counts(machine):
    """set_per_process_memory_fraction leaves less than the driver has free."""
    machine([20 * GIB, 20 * GIB], get_per_process_memory_fraction=lambda index: 0.5 if index else 1.0)
    assert [device.available for device in devices.inventory(Settings())] == [20 * GIB, 12 * GIB]


def test_the_limit_is_read_where_torch_has_no_function_for_it(machine, monkeypatch):
    """PYTORCH_ALLOC_CONF holds it, among other options."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,per_process_memory_fraction:0.25")
    machine([20 * GIB])
    assert devices.inventory(Settings())[0].available == 6 * GIB


def test_a_torch_that_cannot_tell_free_memory(machine, lines, monkeypatch):
    """torch.xpu before 2.6: no plan, and one line that says why."""
    machine([20 * GIB] * 2)
    monkeypatch.setattr(devices, "_module", lambda kind: SimpleNamespace(device_count=lambda: 2))
    assert indices(Settings()) == [] and "cannot tell free memory" in lines[0]


BUILT_FOR_CUDA = ("sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120")
BUILT_FOR_ROCM = ("gfx90a", "gfx942", "gfx10-3-generic", "gfx1100")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True), ((13, 0), True), ((6, 1), False),
     ((7, 0), False), ((10, 0), False)],
)  # fmt: skip
def test_architectures_of_cuda(capability, expected):
    """Binaries of the same major version run from their minor version on; PTX runs on whatever is newer."""
    module = FakeCuda([GIB], [capability], built=BUILT_FOR_CUDA)
    assert eligible_devices.has_kernels(module, 0) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gfx90a:sramecc+:xnack-", True), ("gfx1036", True), ("gfx1100", True), ("gfx1103", False), ("gfx906", False)],
)
def test_architectures_of_rocm(name, expected):
    """Names are compared up to their features; a generic target covers its family."""
    properties = SimpleNamespace(gcnArchName=name, major=9, minor=0)
    module = SimpleNamespace(get_arch_list=lambda: BUILT_FOR_ROCM, get_device_properties=lambda index: properties)
    assert eligible_devices.has_kernels(module, 0) is expected


def test_a_device_without_kernels_is_left_out_unless_named(machine, lines):
    """An old card beside two new ones; who names it has it, and where all would go the list is not trusted."""
    module = machine([20 * GIB] * 3, [(8, 6), (6, 1), (8, 6)], built=BUILT_FOR_CUDA)
    assert indices(Settings()) == [0, 2] and module.asked == [0, 2]
    assert len(lines) == 1 and "cuda:1 (card 1) is not used: this torch has no kernels" in lines[0]
    assert indices(Settings(max_memory={1: 9 * GIB})) == [0, 1, 2]
    module.capabilities = [(6, 1)] * 3
    assert indices(Settings()) == [0, 1, 2]


def test_display_cards_are_told_by_their_memory(machine):
    """Less than a tenth of the largest device; a device that is full of somebody else's memory is none."""
    machine([40 * GIB, 3 * GIB, 2 * GIB], totals=[80 * GIB, 4 * GIB, 24 * GIB])
    usable = devices.inventory(Settings())
    larger, left_out = devices.without_display_cards(usable, Settings())
    assert [device.index for device in larger] == [0, 2] and left_out == "cuda:1 (card 1, 4.0 GiB)"
    named = Settings(max_memory={1: 3 * GIB})
    assert devices.without_display_cards(usable, named) == (usable, "")
    assert devices.computing(Settings()) == (0, 2)


def test_the_first_device_is_never_left_out_as_a_display_card(machine):
    """Inputs arrive on it and outputs return to it whatever the map, so that it is planned for."""
    machine([3 * GIB, 70 * GIB, 70 * GIB], totals=[4 * GIB, 80 * GIB, 80 * GIB])
    usable = devices.inventory(Settings())
    assert devices.without_display_cards(usable, Settings()) == (usable, "")


def test_devices_that_hardly_differ_count_as_equal(machine):
    """What a desktop or a driver holds is not a difference; 600 MiB are."""
    free = [79 * GIB - 13 * MIB, 79 * GIB, 79 * GIB - 500 * MIB, 76 * GIB]
    machine(free, totals=[80 * GIB] * 4)
    capacities = [device.capacity for device in devices.inventory(Settings())]
    assert len(set(capacities[:3])) == 1 and capacities[3] < capacities[0]
    assert all(capacity % (64 * MIB) == 0 for capacity in capacities)


@given(st.integers(4 * MIB, 200 * GIB), st.lists(st.floats(0, 0.009), min_size=2, max_size=8))
def test_levelling_costs_little_and_makes_equal(size, differences):
    """No capacity falls by more than 1.4 %, none rises, and those within 1 % of each other come out the same."""
    before = [Device(index, f"npu:{index}", size, int(size * (1 - part))) for index, part in enumerate(differences)]
    after = levelled(before)
    assert [device.index for device in after] == [device.index for device in before]
    assert len({device.capacity for device in after}) == 1
    for old, new in zip(before, after, strict=True):
        assert 0.986 * old.capacity <= new.capacity <= old.capacity


@pytest.mark.parametrize(
    ("kind", "capability", "gfx", "architecture"),
    [
        ("cuda", (9, 0), "NVIDIA H100 80GB HBM3", Architecture("cuda", (9, 0))),
        ("cuda", (9, 4), "gfx942:sramecc+:xnack-", Architecture("hip", (9, 4))),
        ("npu", None, "", Architecture("npu", None)),
        ("xpu", {"max_work_group_size": 1024}, "", Architecture("xpu", None)),
    ],
)
def test_a_device_knows_whose_rules_it_follows(monkeypatch, kind, capability, gfx, architecture):
    """NVIDIA's and AMD's devices both are "cuda" to torch; other runtimes have no compute capability."""
    module = SimpleNamespace(
        device_count=lambda: 1,
        mem_get_info=lambda index: (GIB, GIB),
        get_device_capability=lambda index: capability,
        get_device_properties=lambda index: SimpleNamespace(gcnArchName=gfx),
    )
    monkeypatch.setattr(devices, "accelerator_type", lambda: kind)
    monkeypatch.setattr(devices, "_module", lambda kind: module)
    (device,) = devices.inventory(Settings())
    assert device.architecture == architecture and device.capability == architecture.capability


def test_workspaces_depend_on_the_architecture():
    """cuBLAS takes 32 MiB a handle on Hopper only; hipBLAS and hipBLASLt take far more; others are not known."""
    sizes = [
        ("cuda", (8, 9), 18),
        ("cuda", (9, 0), 64),
        ("cuda", (12, 0), 18),
        ("hip", (9, 4), 408),
        ("hip", (11, 0), 216),
    ]
    assert [overhead_of(Architecture(*case[:2])) for case in sizes] == [case[2] * MIB for case in sizes]
    assert overhead_of(Architecture("npu", None)) == overhead_of(Architecture("xpu", None)) == 0


def test_devices_with_next_to_no_room_are_named(machine, lines):
    """A script that allows less than a model could use on any device is told so, not that there are no devices."""
    machine([8 * GIB, 8 * GIB])
    assert devices.inventory(Settings(), max_memory={0: "512KiB", 1: "256KiB"}) == ()
    assert lines == [
        "not used, because too little memory is free there or allowed by max_memory: cuda:0 (512.0 KiB), "
        "cuda:1 (256.0 KiB)"
    ]
