"""Launchers' own commands under zero3: a few of `launchers.py`, which tries all of them and is run by hand."""

import importlib.util

import pytest

from tests.sampling import sampled
from tests.zero import launchers

COMMANDS = ["reward"]
SAMPLE = ["accelerate, two processes of four", "accelerate, DeepSpeed config", "accelerate, FSDP"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder with the model, and the losses of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    return folder, launchers.losses_of_one(folder)


@pytest.mark.parametrize("name", sampled(SAMPLE, "accelerate, DeepSpeed config", mark="sweep"))
def test_trains_or_is_refused(name, prepared):
    """Two processes with the losses of one, one line on a number that cannot act, or one line of refusal."""
    launchers.run(name, *prepared)


@pytest.mark.sweep
@pytest.mark.parametrize("what", COMMANDS)
def test_commands_of_trl(what, tmp_path):
    """`trl reward` trains in two processes with the losses of its script in one; its launcher process is left alone."""
    launchers.run_trl(what, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is in none of the lanes")
def test_command_of_axolotl(tmp_path):
    """`axolotl train` trains in two processes with the losses of one, and saves whole weights."""
    launchers.run_axolotl(tmp_path)
