"""`balance-shim doctor`: what it finds, and what it says about it."""

import json
from types import SimpleNamespace

import pytest
import torch

from balance_shim.doctor import accelerators, command, libraries, measuring
from balance_shim.doctor.accelerators import slow_links
from balance_shim.doctor.nccl import Stack, problems
from balance_shim.doctor.section import Section
from balance_shim.settings import Settings
from balance_shim.units import GIB
from tests.processes import code, python


def test_versions_that_go_together_are_no_problem():
    """A newer driver than torch needs is as it should be; a patch level of NCCL makes no difference."""
    assert problems(Stack("12.4", "12.8", "2.21.5", "2.21.6")) == []
    assert problems(Stack("12.4", "12.2", "2.21.5", "2.21.5")) == []  # minor versions are compatible


@pytest.mark.parametrize(
    ("stack", "message"),
    [(Stack("13.0", "12.4", "2.27.3", "2.27.3"), "driver runs CUDA up to 12.4, and torch needs 13.0"),
     (Stack("12.4", "12.4", "2.18.1", "2.21.5", "/opt/nccl"), "NCCL 2.18.1 is loaded although 2.21.5"),
     (Stack("12.4", "", "", "2.21.5"), "torch for CUDA 12.4 sees no device")],
)  # fmt: skip
def test_versions_that_do_not_go_together(stack, message):
    """One line for each mismatch, with what to do."""
    messages = problems(stack)
    assert len(messages) == 1 and message in messages[0]
    assert any(remedy in messages[0] for remedy in ("update", "remove it from", "install"))


def test_without_a_device_nothing_is_measured():
    """One clear line, which is no problem."""
    section = measuring.measure(Settings())
    assert "no accelerator" in section.text and not section.problems


def test_slow_links_are_named_once():
    """A pair far below the fastest one is named, whichever of its directions is slow."""
    speeds = {
        ("a", "b"): 100.0,
        ("b", "a"): 100.0,
        ("a", "c"): 90.0,
        ("c", "a"): 10.0,
        ("b", "c"): 60.0,
        ("c", "b"): 60.0,
    }
    messages = slow_links(speeds)
    assert len(messages) == 1 and messages[0].startswith("a and c reach")
    assert slow_links({("a", "b"): 10.0, ("b", "a"): 9.0}) == []


class FakeCuda:
    """Stands in for `torch.cuda`: a healthy small card, a full one, and one that another process has for itself."""

    FREE = (
        3.4,
        "CUDA error: out of memory\nCompile with",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    )

    def device_count(self):
        return len(self.FREE)

    def get_arch_list(self):
        return ["sm_80"]

    def get_device_properties(self, index):
        pci = {"pci_domain_id": 0, "pci_bus_id": 0x65 + index, "pci_device_id": 0}
        return SimpleNamespace(name="card", major=8, minor=6, total_memory=4 * GIB, **pci)

    def mem_get_info(self, index):
        free = self.FREE[index]
        if isinstance(free, str):
            raise RuntimeError(free)
        return int(free * GIB), 4 * GIB


def test_devices_that_cannot_be_asked_are_problems(monkeypatch):
    """The others are reported all the same, by PCI address, and our own context is nobody else's memory."""
    monkeypatch.setattr("balance_shim.devices.accelerator_type", lambda: "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: FakeCuda())
    monkeypatch.setattr("balance_shim.monitoring.other_processes._running", lambda kind, index: [])
    section = accelerators.inventory()
    assert "cuda:0" in section.text and "00000000:65:00.0" in section.text and "00000000:67:00.0" in section.text
    full, exclusive = section.problems
    assert full.startswith("cuda:1 cannot be used (CUDA error: out of memory): its memory is full")
    assert exclusive.startswith("cuda:2 cannot be used (") and "exclusive" in exclusive


def test_a_section_that_fails_is_a_problem():
    """The report goes on, and the exit code says that something is wrong."""

    def broken():
        raise ZeroDivisionError("planted")

    section = command._guarded("Devices", broken)
    assert section.title == "Devices" and "ZeroDivisionError: planted" in section.problems[0]


def test_versions_in_the_tested_range_are_no_problem(monkeypatch):
    """Neither is one newer than any tested: its seams are looked at by themselves. An older one is."""
    installed = {"llamafactory": "0.9.5", "accelerate": "1.0.1", "peft": "99.0", "transformers": "4.40.0"}
    monkeypatch.setattr(libraries, "version_text", lambda name: installed.get(name, "" if name != "wrapt" else "1.17"))
    problems = libraries.versions(Settings()).problems
    assert problems == (
        "torch is not installed: pip install torch",
        "transformers 4.40.0 is older than any tested version: pip install 'transformers>=4.45.2'",
    )


def test_report_as_json(monkeypatch, capsys):
    """`doctor --json` is one object with every section and problem, without the name of the home folder."""
    devices = Section.of_table("Devices", ["device", "free"], [["cuda:0", "1.0 GiB"]], ["/home/alice/x is full"])
    sections = [Section("Settings", "  BALANCE_CACHE: /home/alice/plans"), devices]
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(command, "_sections", lambda _measure: iter(sections))
    assert command.run(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["sections"] == {"Settings": ["BALANCE_CACHE: ~/plans"],
                                  "Devices": [{"device": "cuda:0", "free": "1.0 GiB"}]}  # fmt: skip
    assert report["problems"] == ["~/x is full"]


def test_copies_that_arrive_changed():
    """doctor names the pair, and what helps; `move()` then goes over host memory, and the weights are right."""
    done = code(
        """
        import torch
        from balance_shim import simulation

        simulation.install(simulation.parse_spec("3x64MiB"))
        from balance_shim import copies
        from balance_shim.doctor import accelerators
        from balance_shim.placement.move import move

        right = copies.direct

        def direct(tensor, target):
            bad = (tensor.device, target) == (torch.device("npu:0"), torch.device("npu:1"))
            return torch.zeros_like(tensor, device=target) if bad else right(tensor, target)

        copies.direct = direct
        section = accelerators.links()
        wrong = [problem for problem in section.problems if "arrive corrupted" in problem]
        assert len(wrong) == 1 and wrong[0].startswith("copies from npu:0 to npu:1"), section.problems
        assert "disable ACS" in wrong[0]
        assert "WRONG" in section.text

        from accelerate import dispatch_model

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        before = [parameter.clone() for parameter in model.parameters()]
        model = dispatch_model(model, {"0": 0, "1": 2})
        move(model, {"0": 1, "1": 0})
        after = [parameter.cpu() for parameter in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after)), "weights were changed"
        assert [str(parameter.device) for parameter in model.parameters()] == ["npu:1"] * 2 + ["npu:0"] * 2
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("copies from npu:0 to npu:1 arrive corrupted, so blocks move through host memory") == 1


def test_on_simulated_devices():
    """All sections on four devices, seams that are patched among them, and no problem with the versions tested here."""
    done = python("-m", "balance_shim", "doctor", BALANCE_SIMULATE="4x1GiB", CUDA_VISIBLE_DEVICES="-1")
    for expected in ("Settings", "transformers.trainer.Trainer.train", "npu:3", "GiB/s to", "NCCL and CUDA"):
        assert expected in done.stdout, done.stdout + done.stderr
    assert "No problems found." in done.stdout and done.returncode == 0


def test_bad_settings_are_problems():
    """What is wrong with a variable is among the problems, and the exit code says that there are some."""
    done = python("-m", "balance_shim", "doctor", BALANCE_MODE="zero3", BALANCE_ZERO_CONFIG="{", BALANCE_SEQ_LEN="x")
    assert done.returncode == 1 and "No problems" not in done.stdout
    listed = done.stdout.partition("Problems, and what to do")[2]
    assert "BALANCE_ZERO_CONFIG is not JSON" in listed and "BALANCE_SEQ_LEN='x'" in listed
