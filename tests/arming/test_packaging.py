"""Wheel and sdist, built and installed in a clean environment, can do what the checkout can."""

import shutil
import sys
import venv
import zipfile

import pytest

from tests.processes import INJECTED, REPOSITORY, run


def pip(*arguments):
    done = run(sys.executable, "-m", "pip", *arguments, paths=())
    assert done.returncode == 0, done.stderr


def built_wheel(source, folder):
    """Build the wheel of `source`, a folder or an sdist."""
    pip("wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what packages are built from; its path has a space and a letter beyond ASCII."""
    source = tmp_path_factory.mktemp("packaging") / "größe 2"
    not_copied = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "shim", source / "shim", symlinks=True, ignore=not_copied)
    shutil.copytree(INJECTED, source / INJECTED.name, ignore=not_copied)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    return source


def test_wheel_of_the_sdist_in_a_clean_environment(source, tmp_path):
    """The injected file is a file of its own, and the installed command arms what it runs.

    Built through the sdist, the wheel has the same content as one of the checkout.
    """
    pytest.importorskip("setuptools")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", build, tmp_path / "sdist", paths=(), cwd=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    wheel = built_wheel(sdist, tmp_path / "through sdist")
    content = zipfile.ZipFile(wheel)
    assert "balance_shim/py.typed" in content.namelist()  # type checkers read the annotations of what is installed
    assert content.read("balance_shim/injection/sitecustomize.py") == (INJECTED / "sitecustomize.py").read_bytes()
    page = {"page.html.j2", "page.css", "page.js"}  # what `balance-shim report` fills in
    assert {f"balance_shim/report/page/{name}" for name in page} <= set(content.namelist())
    direct = zipfile.ZipFile(built_wheel(source, tmp_path / "direct"))
    assert sorted(direct.namelist()) == sorted(content.namelist())

    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "clean")
    python = tmp_path / "clean" / "bin" / "python"
    pip("--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    script = tmp_path / "train.py"
    script.write_text("import sys; print('balance_shim' in sys.modules, sys.path[1].endswith('injection'))")
    assert run(python, "-m", "balance_shim", "run", script, paths=()).stdout == "True True\n"
    version = run(tmp_path / "clean" / "bin" / "balance-shim", "--version", paths=()).stdout
    assert version and version == run(sys.executable, "-m", "balance_shim", "--version").stdout
