"""What `balance-shim run` puts into the environment for torch's allocator."""

import sys

import pytest

from balance_shim import expandable_segments
from balance_shim.cli.main import launch


@pytest.fixture
def linux(monkeypatch):
    """A plain Linux with torch 2.13 for CUDA and without vLLM, whatever this machine is."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(expandable_segments.platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(expandable_segments, "find_spec", lambda name: None)
    installed(monkeypatch, "2.13.0+cu130")
    return monkeypatch


def installed(monkeypatch, torch: str):
    from balance_shim.versions import numbers

    monkeypatch.setattr(expandable_segments, "version_text", lambda name: torch)
    monkeypatch.setattr(expandable_segments, "version_of", lambda name: numbers(torch))


def test_a_program_that_is_run_gets_expandable_segments(linux):
    """Under the name that its torch reads, beside all that was in the environment."""
    assert launch.injected({"A": "b"}).items() >= {"A": "b", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}.items()
    for version in ("2.5.1", "2.9.1+cu128"):  # which ignore the newer name
        installed(linux, version)
        assert expandable_segments.variables({}) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_what_the_user_set_stays_as_it_is(linux, name):
    """Whatever it is, off as well as something else; set but empty is not set."""
    for value in ("expandable_segments:False", "max_split_size_mb:128"):
        assert not expandable_segments.variables({name: value})
    assert expandable_segments.variables({name: ""})


def test_nothing_is_set_where_it_is_not_supported(linux):
    """Other systems, WSL, ROCm, no torch, and beside vLLM, whose sleep mode refuses it."""
    for owner, attribute, value in (
        (sys, "platform", "win32"),
        (expandable_segments.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2"),
        (expandable_segments, "version_text", lambda name: "2.9.0+rocm6.4"),
        (expandable_segments, "version_text", lambda name: ""),
        (expandable_segments, "find_spec", lambda name: name),
    ):
        with linux.context() as patch:
            patch.setattr(owner, attribute, value)
            assert not expandable_segments.variables({}), attribute
    assert expandable_segments.variables({})
