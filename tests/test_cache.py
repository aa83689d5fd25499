"""What is kept on disk is used when it is right, and made again when it is not."""

import importlib
import json
import os
from pathlib import Path

import pytest
import transformers

from balance_shim import cache
from balance_shim.device import Device
from balance_shim.memory import profile as profiling
from balance_shim.memory.fingerprint import fingerprint
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import colocations, planner
from balance_shim.placement.request import Request
from tests import models

DEVICES = tuple(Device(index, f"npu:{index}", 1 << 30, 1 << 30) for index in range(2))


class Maker:
    """Counts how often it is asked."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return {"answer": 42}


def test_what_was_made_is_read_back(tmp_path):
    """The second time nothing is made, and without a folder nothing is kept."""
    make = Maker()
    for _ in range(2):
        assert cache.cached(tmp_path / "new", cache.digest("question"), make) == {"answer": 42}
    assert make.calls == 1
    assert cache.cached(None, "", make) == {"answer": 42} and make.calls == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("42", "43"),
        lambda text: text.replace('"key": "', '"key": "0'),
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "[" * 100_000,
    ],
    ids=["empty", "cut", "other content", "other key", "a list", "null", "deep"],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    """Whatever stands in the file, what comes back is right, and so is the file afterwards."""
    make, key = Maker(), cache.digest("question")
    cache.cached(tmp_path, key, make)
    file = tmp_path / f"{key}.json"
    file.write_text(damage(file.read_text()))
    assert cache.cached(tmp_path, key, make) == {"answer": 42} and make.calls == 2
    assert cache.cached(tmp_path, key, make) == {"answer": 42} and make.calls == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    """A file in the place of the folder, a folder in the place of the file."""
    make, key = Maker(), cache.digest("question")
    (tmp_path / "file").write_text("")
    assert cache.cached(tmp_path / "file", key, make) == {"answer": 42}
    (tmp_path / f"{key}.json").mkdir()
    assert cache.cached(tmp_path, key, make) == {"answer": 42}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_folder_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    """What is there under another user, or on a disk mounted for reading, is of use though it cannot be touched."""
    make, key = Maker(), cache.digest("question")
    cache.cached(tmp_path, key, make)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.cached(tmp_path, key, make) == {"answer": 42} and make.calls == 1


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """In containers a user may have neither HOME nor an entry in the list of users; planning needs no cache."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache.folder_of("") is None


def test_the_oldest_files_go_first(tmp_path, monkeypatch):
    """There are never more than a certain number."""
    monkeypatch.setattr(cache, "MOST_FILES", 3)
    keys = [cache.digest(number) for number in range(5)]
    for age, key in enumerate(keys):
        cache.cached(tmp_path, key, Maker())
        os.utime(tmp_path / f"{key}.json", (age, age))
    assert {path.stem for path in tmp_path.glob("*.json")} == set(keys[2:])


def test_the_usual_folder(monkeypatch, tmp_path):
    """XDG_CACHE_HOME, else ~/.cache; BALANCE_CACHE goes before both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder_of("") == tmp_path / "balance_shim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder_of("") == Path.home() / ".cache" / "balance_shim"
    assert cache.folder_of("/x") == Path("/x") and cache.folder_of(None) is None


@pytest.fixture
def traces(monkeypatch):
    """The workloads that were traced and not read from disk."""
    seen = []
    original = profiling._trace

    def counting(case):
        seen.append(case.workload)
        return original(case)

    monkeypatch.setattr(profiling, "_trace", counting)
    return seen


def request(folder, model=None, **changes):
    return Request(TrainingCase.of(model or models.llama(), Workload(seq_len=64, **changes)), DEVICES, cache=folder)


def test_the_same_plan_comes_from_the_cache(tmp_path, traces):
    """A second model of the same config, with other devices even, is not traced again, and its plan is the same."""
    first = planner.balanced(request(tmp_path))
    second = planner.balanced(request(tmp_path))
    assert first == second and len(traces) == 1
    assert planner.cost(request(tmp_path)).costs == planner.cost(request(None)).costs


@pytest.mark.parametrize(
    "changed",
    [
        lambda folder: request(folder, batch_size=2),
        lambda folder: request(folder, optimizer="sgd"),
        lambda folder: request(folder, models.llama(hidden_size=128)),
        lambda folder: request(folder, models.llama(attention_dropout=0.1)),
        lambda folder: request(folder, half_precision()),
        lambda folder: request(folder, frozen()),
        lambda folder: request(folder, with_forward_replaced()),
        lambda folder: request(folder, tied_by_hand()),
    ],
    ids=["batch", "optimizer", "sizes", "dropout", "dtype", "frozen", "patched forward", "tied by hand"],
)
def test_whatever_matters_is_in_the_key(tmp_path, traces, changed):
    """A workload or a model that differs in anything that takes memory is traced by itself."""
    planner.cost(request(tmp_path))
    planner.cost(changed(tmp_path))
    assert len(traces) == 2


def half_precision():
    return models.llama().bfloat16()


def frozen():
    model = models.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def with_forward_replaced():
    model = models.llama()
    original = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


def tied_by_hand():
    model = models.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_a_file_of_another_version_is_not_used(tmp_path, traces, monkeypatch):
    """A new version of the shim or of a library starts afresh."""
    planner.cost(request(tmp_path))
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    planner.cost(request(tmp_path))
    assert len(traces) == 2
    assert transformers.__version__ in str(fingerprint(TrainingCase.of(models.llama(), Workload())))


def test_files_are_plain_json(tmp_path):
    """Nothing in the cache is ever executed."""
    planner.balanced(request(tmp_path))
    for file in tmp_path.glob("*.json"):
        assert set(json.loads(file.read_text())) == {"key", "checksum", "content"}


def test_a_list_that_a_module_holds_is_part_of_the_key():
    model = models.llama()
    model.skips = [(0, 3)]
    before = fingerprint(TrainingCase.of(model, Workload()))
    assert fingerprint(TrainingCase.of(model, Workload())) == before
    model.skips = [(0, 5)]
    assert fingerprint(TrainingCase.of(model, Workload())) != before


def test_a_config_that_is_no_json_has_a_key_too():
    """4.51 leaves data types in a config inside another, and scripts put things of their own into configs."""
    model = models.llama()
    model.config.of_the_script = {"inner": range(3)}
    before = fingerprint(TrainingCase.of(model, Workload()))
    assert fingerprint(TrainingCase.of(model, Workload())) == before
    assert colocations.of(model) == colocations.of(models.llama())
    model.config.of_the_script = {"inner": range(4)}
    assert fingerprint(TrainingCase.of(model, Workload())) != before


@pytest.mark.parametrize("edited", ["helper.py", "base.py"])
def test_files_of_the_user_beside_the_model_are_part_of_the_key(edited, tmp_path, monkeypatch):
    """What its `forward` calls, and what its class inherits from; not only the file of the class."""
    package = tmp_path / f"own_{edited[0]}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (package / "base.py").write_text("import torch\n\n\nclass Base(torch.nn.Module):\n    pass\n")
    own = "from .base import Base\nfrom .helper import double\n\n\nclass Own(Base):\n    pass\n"
    (package / "model.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module(f"{package.name}.model").Own()
    before = fingerprint(TrainingCase.of(model, Workload()))
    assert fingerprint(TrainingCase.of(model, Workload())) == before
    with (package / edited).open("a") as file:
        file.write("\n# another version\n")
    assert fingerprint(TrainingCase.of(model, Workload())) != before
