"""The matrix of trainers and versions: which cells are chosen, bad input, and that its page is current."""

import subprocess

import pytest

from tests.matrix import command, table
from tests.matrix.cells import GROUPS, cells
from tests.matrix.checkout import examples
from tests.matrix.environments import ENVIRONMENTS, REPOSITORY
from tests.matrix.run import MODES, TRAININGS


def test_the_page_holds_the_records():
    """docs/matrix.md is what `python tests/versions.py --table` writes."""
    assert (REPOSITORY / "docs" / "matrix.md").read_text(encoding="utf-8") == "\n".join(table.lines()) + "\n"


def test_every_cell_can_be_run():
    """Each has an environment, a script and a mode that exist, and stands there once."""
    chosen = cells([], [], [])
    assert len(set(chosen)) == len(chosen) == sum(len(g.names) * len(g.environments) * len(g.modes) for g in GROUPS)
    for cell in chosen:
        assert cell.environment in ENVIRONMENTS and cell.mode in MODES and (TRAININGS / cell.script).exists()


def test_cells_are_chosen_by_name():
    """By environment, by training or library, and by mode."""
    chosen = cells(["transformers-5.24.0"], ["TRL"], ["zero3"])
    assert {(cell.environment, cell.library, cell.mode) for cell in chosen} == {("transformers-5.24.0", "TRL", "zero3")}
    assert [cell.training for cell in cells(["ms-swift-4.6.0"], ["dpo"], ["map"])] == ["dpo"]


@pytest.mark.parametrize("arguments", [["--environment", "4.45"], ["--training", "unknown"], ["--mode", "fast"]])
def test_an_unknown_name_is_refused(arguments, capsys):
    """In one line that lists the names there are."""
    with pytest.raises(SystemExit):
        command.parsed(arguments)
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]


def test_example_scripts_are_those_of_the_tag(tmp_path):
    """Of the environment's version where the checkout has its tag, else those checked out; without any, one line."""
    checkout = tmp_path / "checkout"
    for folder, name, text in (("src/transformers", "__init__.py", '__version__ = "{}"\n'),
                               ("examples/pytorch", "run.py", "# {}\n")):  # fmt: skip
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / name).write_text(text.format("5.0.0"))
    who = ("-c", "user.name=matrix", "-c", "user.email=matrix@localhost")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first"), ("tag", "v5.0.0")):
        subprocess.run(["git", "-C", str(checkout), *arguments], check=True)
    (checkout / "src/transformers/__init__.py").write_text('__version__ = "5.1.0.dev0"\n')
    (checkout / "examples/pytorch/run.py").write_text("# newer\n")
    tagged, there = (examples(checkout, version, tmp_path / "place") for version in ("5.0.0", "5.24.0"))
    assert (tagged.version, (tagged.folder / "run.py").read_text()) == ("5.0.0", "# 5.0.0\n")
    assert (there.version, (there.folder / "run.py").read_text()) == ("5.1.0.dev0", "# newer\n")
    with pytest.raises(SystemExit, match="no example scripts in"):
        examples(tmp_path / "nothing", "5.0.0", tmp_path / "place")
