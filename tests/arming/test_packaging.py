"""What is installed can do what the checkout can: the injected file is in it, as a file of its own."""

import shutil
import sys
import venv
import zipfile

import pytest

from tests.processes import INJECTED, REPOSITORY, run


def test_the_wheel(tmp_path):
    """A wheel has the injected file, and the command it installs arms what it runs, in a bare environment too."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "shim", source / "shim", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(INJECTED, source / INJECTED.name)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    (source / "README.md").write_text("")
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    done = run(sys.executable, "-m", "pip", *build, paths=())
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    injected = zipfile.ZipFile(wheel).read("balance_shim/injection/sitecustomize.py").decode()
    assert injected == (INJECTED / "sitecustomize.py").read_text()

    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "bare")
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    script = tmp_path / "train.py"
    script.write_text("import sys; print('balance_shim' in sys.modules, sys.path[1].endswith('injection'))")
    python = tmp_path / "bare" / "bin" / "python"
    assert run(python, "-m", "balance_shim", "run", script, paths=()).stdout == "True True\n"
