"""Modes: which one is in force, and that seams and others know none of them by name."""

import ast
import inspect
import os
from pathlib import Path

import pytest

from balance_shim import modes, state
from balance_shim.modes.auto import Auto
from balance_shim.modes.balanced import Balanced
from balance_shim.modes.base import Mode
from balance_shim.modes.launcher import ReplicaLauncher, ZeroLauncher
from balance_shim.modes.user_map import UserMap
from balance_shim.modes.zero3 import Zero3
from balance_shim.settings import MODES, Settings
from balance_shim.zero.launching import relaunch

PACKAGE = Path(inspect.getfile(modes)).parent.parent
OBJECTS = {"balanced": Balanced, "map": UserMap, "auto": Auto, "zero3": Zero3, "off": Mode}


@pytest.mark.parametrize("name", MODES)
def test_each_value_has_its_object(name, monkeypatch):
    """Every value of BALANCE_MODE leads to an object of its own, also where it changes within a process."""
    monkeypatch.setattr(state, "settings", lambda: Settings(mode=name))
    assert type(modes.current()) is OBJECTS[name]


def test_a_launcher_trains_nothing(monkeypatch):
    """A program that starts the ranks itself gets no ZeRO-3 of its own."""
    monkeypatch.setattr(state, "settings", lambda: Settings(mode="zero3"))
    monkeypatch.setattr(relaunch, "is_launcher", lambda: True)
    assert type(modes.current()) is ZeroLauncher
    assert not isinstance(modes.current(), Zero3)


def test_llama_factory_starts_ranks_whatever_their_number(monkeypatch):
    """Also where the user asks for one process, or there is one device: it would train in its own process otherwise."""
    monkeypatch.setattr(state, "settings", lambda: Settings(mode="zero3", nproc=2))
    for name in ("FORCE_TORCHRUN", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    ZeroLauncher().before_launcher("llamafactory")
    assert (os.environ.pop("FORCE_TORCHRUN"), os.environ["NPROC_PER_NODE"]) == ("1", "1")


@pytest.mark.parametrize("kind", [Balanced, UserMap, Auto, Zero3, ZeroLauncher, ReplicaLauncher])
def test_overridden_moments_take_what_seams_give(kind):
    """A moment has as many arguments in each mode as in the base, which is what seams call."""
    for name, moment in inspect.getmembers(Mode, inspect.isfunction):
        assert len(inspect.signature(getattr(kind, name)).parameters) == len(inspect.signature(moment).parameters), name


# Where the mode is decided, and the records and options that tell whose a map is.
DECIDING = (
    "settings.py", "state.py", "arming.py", "placement/plan.py", "plan_options.py", "report/recorded_plan.py",
)  # fmt: skip


def test_modes_are_compared_in_their_room_only():
    """Outside of modes/, and of what decides on the mode, no condition names one."""
    deciding = {PACKAGE / name for name in DECIDING}
    for path in PACKAGE.rglob("*.py"):
        if path in deciding or path.parent.name == "modes":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                assert not any(isinstance(side, ast.Attribute) and side.attr == "mode" for side in sides), path
