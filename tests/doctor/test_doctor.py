"""`balance-shim doctor`: what it finds, and what it says about it."""

import pytest

from balance_shim.doctor.accelerators import slow_links
from balance_shim.doctor.nccl import Stack, problems
from tests.processes import python


def test_versions_that_go_together_are_no_problem():
    """A newer driver than torch needs is as it should be; a patch level of NCCL makes no difference."""
    assert problems(Stack("12.4", "12.8", "2.21.5", "2.21.6")) == []
    assert problems(Stack("12.4", "12.2", "2.21.5", "2.21.5")) == []  # minor versions are compatible


@pytest.mark.parametrize(
    ("stack", "said"),
    [(Stack("13.0", "12.4", "2.27.3", "2.27.3"), "driver runs CUDA up to 12.4, and torch needs 13.0"),
     (Stack("12.4", "12.4", "2.18.1", "2.21.5", "/opt/nccl"), "NCCL 2.18.1 is loaded although 2.21.5"),
     (Stack("12.4", "", "", "2.21.5"), "torch for CUDA 12.4 sees no device")],
)  # fmt: skip
def test_versions_that_do_not_go_together(stack, said):
    """One line for each mismatch, with what to do."""
    found = problems(stack)
    assert len(found) == 1 and said in found[0]
    assert any(word in found[0] for word in ("update", "take it off", "install"))


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
    found = slow_links(speeds)
    assert len(found) == 1 and found[0].startswith("a and c reach")
    assert slow_links({("a", "b"): 10.0, ("b", "a"): 9.0}) == []


@pytest.mark.slow
def test_on_simulated_devices():
    """All sections on four devices, seams that are patched among them, and no problem with the versions tested here."""
    done = python("-m", "balance_shim", "doctor", BALANCE_SIMULATE="4x1GiB", CUDA_VISIBLE_DEVICES="-1")
    for expected in ("Settings", "transformers.trainer.Trainer.train", "npu:3", "GiB/s to", "NCCL and CUDA"):
        assert expected in done.stdout, done.stdout + done.stderr
    assert "No problems found." in done.stdout and done.returncode == 0


@pytest.mark.slow
def test_bad_settings_are_problems():
    """What is wrong with a variable is among the problems, and the exit code says that there are some."""
    done = python("-m", "balance_shim", "doctor", BALANCE_MODE="zero3", BALANCE_ZERO_CONFIG="{", BALANCE_SEQ_LEN="x")
    assert done.returncode == 1 and "No problems" not in done.stdout
    listed = done.stdout.partition("Problems, and what to do")[2]
    assert "BALANCE_ZERO_CONFIG is not JSON" in listed and "BALANCE_SEQ_LEN='x'" in listed
