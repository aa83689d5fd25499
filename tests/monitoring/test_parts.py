"""Smaller parts of the monitor: batches, files, readings, who else is on a device, TensorBoard."""

import os
import sys
import types

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from balance_shim.monitoring import allocation_sites, leak_search, monitor, other_processes
from balance_shim.monitoring.batch import size_of
from balance_shim.monitoring.files import Lines, folder_for, free_name
from balance_shim.monitoring.readings import Meter, Reading

GIB = 1 << 30


def test_sizes_of_batches():
    """Tokens come from input_ids, padded or packed; pictures count as elements; anything else is no failure."""
    ids = torch.ones(2, 8, dtype=torch.int64)
    size = size_of({"input_ids": ids, "pixel_values": torch.ones(3, 4), "note": "x"})
    assert (size.tokens, size.elements, size.bytes) == (16, 28, 128 + 48)
    assert size_of({"input_ids": ids[0]}).tokens == 8
    assert size_of([{"prompt": "a"}]).elements == 0 and size_of(None).tokens == 0


def test_a_record_never_overwrites_another(tmp_path):
    """A second training writes beside the first one's record; each line is on disk at once."""
    for number, name in ((1, "memory.jsonl"), (2, "memory-2.jsonl")):
        lines = Lines(str(tmp_path / "new"), "memory")
        lines.add({"step": number})
        assert (tmp_path / "new" / name).read_text() == f'{{"step": {number}}}\n'
        lines.close()
    assert free_name(str(tmp_path / "new"), "memory", "jsonl").endswith("memory-3.jsonl")
    assert folder_for("text", "out") == folder_for("off", "out") == "out" and folder_for("/r", "out") == "/r"


def test_a_record_that_cannot_be_written_ends_with_one_warning(tmp_path, capsys):
    """A folder that cannot be made is said once, and the training is not bothered again."""
    (tmp_path / "file").write_text("")
    lines = Lines(str(tmp_path / "file" / "folder"), "memory")
    lines.add({})
    lines.add({})
    lines.close()
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_full_disk_ends_the_record_and_nothing_else(tmp_path, capsys):
    """What is buffered cannot be written when the file is closed, either; the table at the end follows."""
    lines = Lines(str(tmp_path), "memory")
    lines.add({"step": 1})
    lines._file.close()
    lines._file = open("/dev/full", "w")  # noqa: SIM115
    lines.add({"step": 2})
    lines.close()
    assert "No space left on device" in capsys.readouterr().err


class Module:
    """A device module as torch.cuda is, or (`nested` left out) as those of other platforms."""

    def __init__(self, nested=True, stats=None):
        stats = stats if stats is not None else {"allocated": (30, 70), "reserved": (80, 90)}
        self.stats = {f"{key}_bytes": {"all": {"current": now, "peak": peak}} for key, (now, peak) in stats.items()}
        if nested:
            self.memory_stats_as_nested_dict = lambda index: self.stats

    def mem_get_info(self, index):
        return 15, 100

    def memory_stats(self, index):
        return {f"{key}.all.{when}": size for key, pool in self.stats.items() for when, size in pool["all"].items()}


@pytest.mark.parametrize("nested", [True, False])
def test_readings(monkeypatch, nested):
    """What others have is neither free nor reserved by us; both forms of statistics are read."""
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module(nested))
    meter = Meter("npu", [0, 1])
    assert meter.names == ("npu:0", "npu:1") and meter.totals == (100, 100)
    assert meter.read() == (Reading(30, 80, 70, 5),) * 2
    assert meter.read(with_others=False)[0].others is None and meter.peaks() == (70, 70)


def test_a_device_that_was_never_touched(monkeypatch):
    """CUDA has no statistics of a device before its first use."""
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module(stats={}))
    assert Meter("npu", [0]).read() == (Reading(0, 0, 0, 85),)


class SmallCard(Module):
    """5 GiB, of which the allocator has 1 GiB and the driver 3.4 GiB free; 0.6 GiB are not torch's."""

    def __init__(self):
        super().__init__(stats={"allocated": (GIB // 2, GIB), "reserved": (GIB, GIB)})

    def mem_get_info(self, index):
        return int(3.4 * GIB), 5 * GIB


def test_our_own_context_is_nobody_elses(monkeypatch):
    """Where nothing tells them apart, an allowance for the context is ours, and the reading is not exact."""
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SmallCard())
    monkeypatch.setattr(other_processes, "_running", lambda kind, index: [])
    meter = Meter("cuda", [0])
    (reading,) = meter.read()
    assert reading.others == pytest.approx(0.1 * GIB, rel=0.01) and not meter.exact


def test_nvml_tells_what_is_ours(monkeypatch):
    """The figure of our own process, context and all; another process keeps the rest."""
    own_process = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=int(1.3 * GIB))
    other_process = types.SimpleNamespace(pid=1, usedGpuMemory=int(0.3 * GIB))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SmallCard())
    monkeypatch.setattr(other_processes, "_running", lambda kind, index: [other_process, own_process])
    meter = Meter("cuda", [0])
    (reading,) = meter.read()
    assert reading.others == pytest.approx(0.3 * GIB, rel=0.01) and meter.exact


def test_paged_optimizer_state_is_ours(monkeypatch):
    """bitsandbytes pages it in beside torch's allocator; its tensors are on the host for torch."""
    state = torch.zeros(1000, dtype=torch.uint8)
    state.is_paged, state.page_deviceid = True, 1
    plain = torch.zeros(1000)
    optimizer = types.SimpleNamespace(is_paged=True, state={0: {"state1": state, "step": 3}, 1: {"state1": plain}})
    assert other_processes.paged_state(types.SimpleNamespace(optimizer=optimizer)) == {1: 1000}
    assert (
        other_processes.paged_state(torch.optim.SGD([torch.nn.Parameter(plain)]))
        == {}
        == other_processes.paged_state(None)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SmallCard())
    monkeypatch.setattr(other_processes, "_running", lambda kind, index: [])
    meter = Meter("cuda", [0])
    meter.paged = {0: GIB}
    assert meter.read()[0].others == 0


def test_other_processes_are_named_where_nvml_is_there(monkeypatch):
    """With pynvml the others on a CUDA device have their number and size; without it nothing is said."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert other_processes.processes_on("cuda", 0) == ""
    process = types.SimpleNamespace(pid=1, usedGpuMemory=3 << 30)
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [process] if handle == "GPU-abc" else [],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="abc"))
    assert (
        other_processes.processes_on("cuda", 0) == "process 1 with 3.0 GiB"
        and other_processes.processes_on("npu", 0) == ""
    )


def test_tensorboard_gets_the_highest_values_in_the_runs_own_writer():
    """What was highest since the last log is written under the step of the log, by the writer that is there."""
    written = []

    class TensorBoardCallback:
        tb_writer = types.SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))

    trainer = types.SimpleNamespace(
        callback_handler=types.SimpleNamespace(callbacks=[object(), TensorBoardCallback()]),
        state=types.SimpleNamespace(global_step=20),
    )
    watching = monitor.Monitor.__new__(monitor.Monitor)
    watching._trainer, watching._since_log = trainer, {}
    watching._meter = types.SimpleNamespace(names=("npu:0",))
    for peak in (1 << 30, 3 << 30, 2 << 30):
        watching._note_for_log((Reading(0, 0, peak, None),))
    watching.logged()
    assert ("memory_GiB/npu:0/peak", 3.0, 20) in written and len(written) == 3
    watching.logged()
    assert len(written) == 3


def test_tensors_without_memory_stop_no_step():
    """Nested and sparse outputs have no storage to be known by: they are not noted, and the forward pass goes on."""

    class Odd(torch.nn.Module):
        def forward(self, x):
            nested = torch.nested.nested_tensor([x, x[:1]])
            return {"nested": nested, "sparse": x.to_sparse(), "plain": x + 1, "more": [TwoTensor(x, x)]}

    model = torch.nn.Sequential(Odd())
    noting = allocation_sites.Makers(model)
    noting.start()
    try:
        outputs = model(torch.ones(2, 3))
    finally:
        noting.stop()
    assert noting.of([outputs["plain"]]) == "made by 0" and noting.of([outputs["sparse"]]) == ""


def test_a_hook_that_fails_stops_no_step(monkeypatch):
    """Whatever goes wrong in it, the module's output is what it was."""
    monkeypatch.setattr(allocation_sites, "_storage", lambda tensor: 1 / 0)
    noting = allocation_sites.Makers(model := torch.nn.Sequential(torch.nn.ReLU()))
    noting.start()
    try:
        assert torch.equal(model(torch.ones(2)), torch.ones(2))
    finally:
        noting.stop()


class Keeper:
    def __init__(self):
        self.states = []


@pytest.fixture
def search_on_cpu(monkeypatch):
    """The search, as on a device that held nothing before the test: this process holds tensors of other tests."""
    every = leak_search._tensors
    before = every("cpu")  # kept, so that no new tensor gets the identity of one of them
    earlier_ids = {id(tensor) for tensor in before}
    monkeypatch.setattr(
        leak_search, "_tensors", lambda kind: [tensor for tensor in every(kind) if id(tensor) not in earlier_ids]
    )
    return lambda: leak_search.search("cpu", None, None)


@pytest.mark.parametrize("depth", ["tensors", "tuples", "dicts"])
def test_who_keeps_tensors(search_on_cpu, depth):
    """A list in an object is named, also where it holds tuples or dicts of tensors; what belongs to a model is not."""
    keeper = Keeper()
    for _ in range(12):
        made = [torch.zeros(1000, 1000) for _ in range(1 if depth == "tensors" else 3)]
        keeper.states.append({"tensors": made[0], "tuples": tuple(made), "dicts": dict(enumerate(made))}[depth])
    made = None
    holding = search_on_cpu()
    assert holding.holder.startswith("list `states` of Keeper") and not holding.is_cache
    assert holding.shapes == f"{12 if depth == 'tensors' else 36} x (1000, 1000)" and holding.graphs == 0


def test_a_cache_is_called_one(search_on_cpu):
    """What calls itself a cache is said to be one that is not cleared."""
    cache = {number: torch.zeros(1000, 1000) for number in range(9)}
    holding = search_on_cpu()
    assert holding.is_cache and "`cache` in test_a_cache_is_called_one()" in holding.holder
    assert "a cache that is not cleared" in holding.describe() and len(cache) == 9


def test_tensors_with_graphs_come_first(search_on_cpu):
    """Three small losses with their graphs are a better reason than large tensors without."""
    large = [torch.zeros(1000, 1000) for _ in range(5)]
    weight = torch.ones(3, requires_grad=True)
    losses = [(weight * number).sum() for number in range(4)]
    holding = search_on_cpu()
    assert (
        holding.graphs == 4 and "list `losses`" in holding.describe() and "each retains the graph" in holding.describe()
    )
    assert len(large) == 5 and len(losses) == 4
