"""Armed at interpreter start, by `sitecustomize_example/`: in interpreters that may train, and in no other."""

import os
import sys
import textwrap
import venv

import pytest

from tests.processes import INJECTED, SHIM, code, output_of, python, run

START = (SHIM, INJECTED)
STATUS = "import sys; m = sys.modules.get('balance_shim'); print(m is not None and m.status().armed)"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An interpreter without torch, as a build tool or another project has."""
    folder = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return folder / "bin" / "python"


@pytest.mark.parametrize("variables", [{}, {"BALANCE_MODE": "off"}, {"BALANCE_MODE": " "},
                                       {"BALANCE_MODE": "off", "BALANCE_DEVICE_MAP": "{}"},
                                       {"BALANCE_BATCH_SIZE": "x"}])  # fmt: skip
def test_not_asked_for(variables):
    """Without a mode nothing at all is touched: the package is not even imported."""
    text = "import sys; print([n for n in sys.modules if 'balance' in n], [type(f) for f in sys.meta_path])"
    with_us, without = output_of(text, paths=START, **variables), output_of(text, paths=(SHIM,))
    assert with_us == without


@pytest.mark.parametrize("variables", [{"BALANCE_MODE": "balanced"}, {"BALANCE_DEVICE_MAP": '{"": 0}'}])
@pytest.mark.parametrize("paths", [START, (INJECTED, SHIM), (SHIM / "balance_shim" / "injection",)], ids=str)
def test_asked_for(variables, paths):
    """A mode, or a map, arms; with the package on the path, or found around the injected file."""
    assert output_of(STATUS, paths=paths, **variables) == "True"


def test_one_problem_one_line_nothing_raised():
    """A fatal problem is one line at start; the program runs, and is stopped where it would load a model."""
    text = "import balance_shim, balance_shim.state as s\nprint(1)\ns.raise_pending()"
    done = code(text, paths=START, BALANCE_MODE="map")
    assert done.stdout == "1\n"
    assert done.stderr.startswith("balance_shim: error: BALANCE_MODE=map")
    assert done.stderr.count("\n") == 1 and done.returncode == 1


def test_the_first_model_is_refused():
    """The real seam raises the pending problem before it looks for the model."""
    pytest.importorskip("transformers")
    text = "from transformers import AutoModel, PreTrainedModel\nPreTrainedModel.from_pretrained('nothing')"
    done = code(text, paths=START, BALANCE_MODE="map")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("balance_shim: error: BALANCE_MODE=map needs BALANCE_DEVICE_MAP")


def test_bad_devices_are_refused_when_torch_comes():
    """A bad BALANCE_SIMULATE stops the program before it can use a real device."""
    pytest.importorskip("torch")
    done = code("print(1)\nimport torch", paths=START, BALANCE_SIMULATE="4xtoday")
    assert done.stdout == "1\n" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("balance_shim: error: BALANCE_SIMULATE='4xtoday'")


def test_simulation_alone_balances_nothing():
    """BALANCE_SIMULATE without a mode simulates, says that nothing is balanced, and arms nothing."""
    pytest.importorskip("torch")
    text = "import torch, balance_shim; print(torch.accelerator.device_count(), balance_shim.status().armed)"
    done = code(text, paths=START, BALANCE_SIMULATE="3x1GiB")
    assert done.stdout == "3 False\n" and "BALANCE_MODE is not set" in done.stderr


@pytest.mark.parametrize("flag", ["-S", "-I", "-E"])
def test_flags_that_mean_without(flag):
    """Interpreters told to ignore the environment or site do."""
    done = python(flag, "-c", STATUS, paths=START, BALANCE_MODE="map")
    assert (done.stdout, done.stderr) == ("False\n", "")


BYSTANDERS = {
    "pip": ("-m", "pip", "--version"),
    "pip in one word": ("-mpip", "--version"),
    "pip after options": ("-W", "ignore", "-um", "pip", "--version"),
    "py_compile": ("-m", "py_compile", os.devnull),
    "compileall": ("-m", "compileall", "-q", os.devnull),
    "venv": ("-m", "venv", "--help"),
    "ensurepip": ("-m", "ensurepip", "--version"),
    "our own command": ("-m", "balance_shim", "--version"),
    "a setup.py through -c": ("-c", "'setuptools'; '/x/setup.py'; " + STATUS),
    "a multiprocessing helper": ("-c", "from multiprocessing.resource_tracker import main; " + STATUS),
}


@pytest.mark.parametrize("name", BYSTANDERS)
def test_interpreters_that_do_not_train(name):
    """pip, builds, helpers: not armed, nothing printed, whatever stands in our variables."""
    with_us = python(*BYSTANDERS[name], paths=START, BALANCE_MODE="map", BALANCE_SEQ_LEN="x")
    without = python(*BYSTANDERS[name])
    assert (with_us.returncode, with_us.stderr) == (without.returncode, without.stderr)
    assert with_us.stdout == without.stdout


@pytest.mark.parametrize("name", ["pip", "pip3.11", "setup.py", "_in_process.py", "balance-shim"])
def test_programs_that_do_not_train(name, tmp_path):
    """The same told by the name of the script."""
    (tmp_path / name).write_text("import sys; print('balance_shim' in sys.modules)")
    done = python(str(tmp_path / name), paths=START, BALANCE_MODE="map")
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("arguments", [("{}", "-m", "pip"), ("{}", "pip"), ("-u", "{}", "-c")])
def test_scripts_whose_arguments_look_like_that(arguments, tmp_path):
    """Only the program counts, not what is among its arguments."""
    script = tmp_path / "train.py"
    script.write_text(STATUS)
    command = [argument.format(script) for argument in arguments]
    assert python(*command, paths=START, BALANCE_MODE="balanced").stdout == "True\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers(method, tmp_path):
    """Data workers, however started, run and print nothing."""
    script = tmp_path / "train.py"
    script.write_text(
        "import multiprocessing\n"
        "def work(number):\n    return number + 1\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context('{method}').Pool(2) as pool:\n"
        "        print(pool.map(work, range(3)))\n"
    )
    done = python(str(script), paths=START, BALANCE_MODE="balanced", BALANCE_SEQ_LEN="x")
    assert done.stdout == "[1, 2, 3]\n" and done.stderr.count("\n") == 1, done.stderr


def test_an_interpreter_without_torch(bare):
    """Another environment that inherits our variables runs as without us, silently."""
    for paths in (START, (SHIM / "balance_shim" / "injection",)):
        done = code("print(1)", executable=bare, paths=paths, BALANCE_MODE="map", BALANCE_SEQ_LEN="x")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_package_that_cannot_be_imported(tmp_path):
    """With the folder on the path but not the package: one line, and the program runs."""
    bare = venv.EnvBuilder(symlinks=True)  # the interpreter of these tests has the package installed
    bare.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    done = code("print(1)", paths=(INJECTED,), executable=python, BALANCE_MODE="balanced")
    assert done.stdout == "1\n"
    assert done.stderr.count("\n") == 1 and "not armed (ModuleNotFoundError" in done.stderr


def test_a_package_that_is_broken(tmp_path):
    """A failure of our own at start costs one line."""
    (tmp_path / "balance_shim").mkdir()
    (tmp_path / "balance_shim" / "__init__.py").write_text("1 / 0")
    done = code("print(1)", paths=(tmp_path, INJECTED), BALANCE_MODE="balanced")
    assert done.stdout == "1\n"
    assert done.stderr == "balance_shim: warning: not armed (ZeroDivisionError: division by zero); running without it\n"


def test_the_file_is_readable_for_old_interpreters():
    """Syntax of Python 3.4 at most, and no names that old versions lack before the version is asked."""
    import ast

    text = (INJECTED / "sitecustomize.py").read_text()
    ast.parse(text, feature_version=(3, 4))
    assert not any(isinstance(node, ast.JoinedStr) for node in ast.walk(ast.parse(text)))
    assert (SHIM / "balance_shim" / "injection" / "sitecustomize.py").read_text() == text


def test_an_old_interpreter(tmp_path):
    """An interpreter older than the package needs runs the hidden file and is not armed."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    text = """
        import sys
        sys.version_info = (3, 8, 0)
        del sys.orig_argv
        import sitecustomize
        print('balance_shim' in sys.modules)
        """
    done = python("-S", "-c", textwrap.dedent(text), paths=(SHIM, INJECTED, tmp_path), BALANCE_MODE="balanced")
    assert done.stdout == "theirs\nFalse\n", done.stderr


# What the user's own sitecustomize may be, and what an interpreter without us makes of it.
THEIRS = {
    "none": None,
    "good": "import sys; sys.theirs = __file__; sys.path.append('/added'); sys.path.insert(0, '/first')",
    "broken": "import sys; sys.theirs = 1; 1 / 0",
    "missing a module": "import sys; sys.theirs = 1; import a_module_that_is_not_there",
    "syntax": "this is no Python",
    "says no": "import sys; sys.theirs = 1; raise ImportError('no', name='sitecustomize')",
    "chains itself": (
        "import sys, os; sys.theirs = 1; here = os.path.dirname(__file__); this = sys.modules.pop('sitecustomize')\n"
        "sys.path.remove(here)\n"
        "try:\n    import sitecustomize\nexcept ImportError:\n    sys.modules['sitecustomize'] = this\n"
        "sys.path.append(here)\n"
    ),
}
SEEN = """
import sys, os
found = sys.modules.get("sitecustomize")
file = getattr(found, "__file__", None)
print(hasattr(sys, "theirs"), file, sys.path)
print(sys.modules.get("balance_shim") is not None, file=sys.stderr)
"""


@pytest.mark.parametrize("mode", ["balanced", "off"])
@pytest.mark.parametrize("name", THEIRS)
def test_the_hidden_sitecustomize(name, mode, tmp_path):
    """It runs, fails and stands in sys.modules exactly as without us, and we are armed all the same."""
    if THEIRS[name] is not None:
        (tmp_path / "sitecustomize.py").write_text(THEIRS[name])
    # The same folders in both, so that sys.path can be compared; `empty` takes our place.
    empty = tmp_path / "empty"
    empty.mkdir()
    reference = code(SEEN, paths=(SHIM, empty, tmp_path))
    armed_run = code(SEEN, paths=(SHIM, INJECTED, tmp_path), BALANCE_MODE=mode)
    stdout = armed_run.stdout.replace(str(INJECTED), str(empty))
    if name in ("none", "says no"):
        # There is nothing to stand for it: our own module may.
        stdout = stdout.replace(f"{empty}/sitecustomize.py", reference.stdout.split()[1])
    assert stdout == reference.stdout
    output, armed = armed_run.stderr.rstrip("\n").rpartition("\n")[::2]
    assert output == reference.stderr.rstrip("\n").rpartition("\n")[0]
    assert armed == str(mode == "balanced")


def test_a_hidden_sitecustomize_that_exits(tmp_path):
    """SystemExit there ends the interpreter, with us as without."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(5)")
    reference = code("print(1)", paths=(SHIM, tmp_path))
    armed_run = code("print(1)", paths=(SHIM, INJECTED, tmp_path), BALANCE_MODE="balanced")
    assert (armed_run.returncode, armed_run.stdout) == (reference.returncode, reference.stdout) != (0, "1\n")


def test_our_folder_twice_and_written_otherwise(tmp_path):
    """Our folder given twice, with a slash, through a link, beside our other copy: the hidden file still runs once."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.times = getattr(sys, 'times', 0) + 1")
    link = tmp_path / "link"
    link.symlink_to(INJECTED)
    paths = (SHIM, INJECTED, f"{INJECTED}/", link, SHIM / "balance_shim" / "injection", tmp_path)
    text = "import sys; print(sys.times, sys.modules['sitecustomize'].__file__); " + STATUS
    expected = f"1 {tmp_path / 'sitecustomize.py'}\nTrue"
    assert output_of(text, paths=paths, BALANCE_MODE="balanced") == expected


def test_a_hidden_sitecustomize_that_asks_for_us(tmp_path):
    """The user's file may set the variables, or import the package; both arm."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['BALANCE_MODE'] = 'auto'")
    text = "import balance_shim; print(balance_shim.status().mode)"
    assert output_of(text, paths=(SHIM, INJECTED, tmp_path)) == "auto"
    (tmp_path / "sitecustomize.py").write_text("import balance_shim")
    assert output_of(STATUS, paths=(SHIM, tmp_path)) == "True"


def test_pip_installs_under_us(bare, tmp_path):
    """A real installation, build and all, is not disturbed."""
    pytest.importorskip("setuptools")
    project = tmp_path / "project"
    project.mkdir()
    (project / "setup.py").write_text("from setuptools import setup; setup(name='nothing-at-all', version='1')")
    done = run(
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--target", tmp_path / "target", project,
        paths=START, BALANCE_MODE="map", BALANCE_SEQ_LEN="x",
    )  # fmt: skip
    assert done.returncode == 0 and "balance_shim" not in done.stdout + done.stderr, done.stderr
    assert list((tmp_path / "target").glob("nothing_at_all*"))
