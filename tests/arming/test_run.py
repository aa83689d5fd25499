"""`balance-shim run` and `simulate`: the process becomes the user's program, with its exit code and its signals."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.processes import SHIM, environment, python, run

RUN = ("-m", "balance_shim", "run")
SHOW = (
    "import json, os, sys; print(json.dumps([sys.argv, os.environ.get('BALANCE_MODE'), 'balance_shim' in sys.modules]))"
)


def program(path, text, executable=True):
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    return program(folder / "train it.py", SHOW, executable=False)


def test_a_script_and_its_arguments(script):
    """Arguments arrive word by word, spaces and options of ours included."""
    done = python(*RUN, str(script), "a b", "--gpus", "", "-m", "--help", "*")
    assert done.stdout == f'[["{script}", "a b", "--gpus", "", "-m", "--help", "*"], "balanced", true]\n', done.stderr


@pytest.mark.parametrize(("variables", "mode"), [({"BALANCE_MODE": "auto"}, '"auto", true'),
                                                 ({"BALANCE_MODE": "off"}, '"off", false'),
                                                 ({"BALANCE_DEVICE_MAP": '{"": 0}'}, "null, true")])  # fmt: skip
def test_a_mode_of_the_user(script, variables, mode):
    """A mode that is set stays; a map alone goes on to imply its own."""
    assert python(*RUN, str(script), **variables).stdout.endswith(f"{mode}]\n")


@pytest.mark.parametrize(
    "command",
    [("-m", "shown", "a b"), ("-c", SHOW, "a b"), ("-u", "{folder}/shown.py", "a b"), ("{folder}/shown", "a b"),
     ("{folder}/itself", "a b"), ("{folder}/package", "a b"), ("shown-program", "a b")],
)  # fmt: skip
def test_every_kind_of_program(tmp_path, command):
    """Modules, code, options for Python, files of any name, folders, and programs on PATH are armed."""
    for name in ("shown.py", "shown"):
        program(tmp_path / name, SHOW, executable=False)
    program(tmp_path / "itself", f"#!{sys.executable}\n{SHOW}")
    (tmp_path / "package").mkdir()
    program(tmp_path / "package" / "__main__.py", SHOW)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "shown-program", f"#!{sys.executable}\n{SHOW}")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [argument.format(folder=tmp_path) if argument != SHOW else argument for argument in command]
    done = python(*RUN, *command, paths=(SHIM, tmp_path), PATH=path)
    assert done.stdout.endswith('"a b"], "balanced", true]\n'), done.stderr


def test_a_program_beside_the_interpreter_comes_first(tmp_path):
    """`run swift` means the swift of this environment, even if it is not activated and PATH has another."""
    program(tmp_path / "pytest", "#!/bin/sh\necho another\n")
    done = python(*RUN, "pytest", "--version", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "another" not in done.stdout and done.returncode == 0


def test_a_program_that_is_no_python():
    """A shell script or a binary is just executed; what it starts is armed."""
    done = python(*RUN, "sh", "-c", 'exec "$0" -c "import sys; print(\'balance_shim\' in sys.modules)"', sys.executable)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(("name", "code"), [("missing.py", 2), ("./missing", 127), ("missing-program", 127), (None, 2),
                                            ("locked", 126)])  # fmt: skip
def test_what_cannot_be_run(tmp_path, name, code):
    """One line, and the exit code that Python or a shell would give."""
    locked = program(tmp_path / "locked", "#!/bin/sh\n", executable=False)
    done = python(*RUN, *([] if name is None else [str(locked) if name == "locked" else name]))
    assert done.returncode == code and done.stderr.startswith("balance-shim: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["-I", "-S", "-uE"])
def test_options_that_would_disarm(script, option):
    """Options that make Python ignore us are refused, not silently obeyed."""
    done = python(*RUN, option, str(script))
    assert done.returncode == 2 and "import balance_shim in the script instead" in done.stderr and not done.stdout
    assert python(*RUN, "-W", "ignore", "-Xdev", "-B", str(script)).returncode == 0


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code(tmp_path, code):
    """It is the script's own."""
    script = program(tmp_path / "train.py", f"raise SystemExit({code})")
    assert python(*RUN, str(script)).returncode == code


def _hear_interrupts():
    """A shell that starts this test run in the background has it, and all below it, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_the_script(tmp_path, number):
    """The script has the very process that was started: a signal finds it, and nothing is left running."""
    script = program(tmp_path / "train.py", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, *RUN, str(script)],
        env=environment(SHIM), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=_hear_interrupts,
    )  # fmt: skip
    with process:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        assert process.wait(10) == -number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_script_that_handles_its_signal(tmp_path):
    """The script's own handler runs, and decides the exit code."""
    script = program(
        tmp_path / "train.py",
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n",
    )
    command = [sys.executable, *RUN, str(script)]
    with subprocess.Popen(command, env=environment(SHIM), stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.1)
        process.terminate()
        assert process.wait(10) == 9


def test_the_command_does_not_arm_itself(tmp_path):
    """Neither `python -m balance_shim` nor the installed command is armed, and neither stops over a bad setting."""
    command = program(
        tmp_path / "balance-shim",
        f"#!{sys.executable}\nimport sys\nfrom balance_shim.cli.main import main\n"
        "import balance_shim\nassert not balance_shim.status().armed\nsys.exit(main())\n",
    )
    for prefix in ((sys.executable, "-m", "balance_shim"), (sys.executable, "-mbalance_shim"), (command,)):
        done = run(*prefix, "--version", BALANCE_MODE="map", BALANCE_SEQ_LEN="x")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("balance-shim ")


def test_env_lists_every_variable():
    """Each variable with its value or default, and what is wrong, which is also the exit code."""
    from balance_shim.settings import VARIABLES

    done = python("-m", "balance_shim", "env", BALANCE_SEQ_LEN="x", BALANCE_MODE="auto")
    assert all(variable.name in done.stdout and variable.allowed in done.stdout for variable in VARIABLES)
    assert "BALANCE_MODE = auto" in done.stdout and "warning: BALANCE_SEQ_LEN='x'" in done.stdout
    assert done.returncode == 0
    assert python("-m", "balance_shim", "env", BALANCE_MODE="map").returncode == 1


def test_simulate_hands_the_devices_on(script):
    """The script finds its devices in BALANCE_SIMULATE, and keeps its own options."""
    show = "import os, sys; print(os.environ['BALANCE_SIMULATE'], sys.argv[1:])"
    script.write_text(show)
    command = ("-m", "balance_shim", "simulate", "--shapes-only", "--gpus", "2x1GiB", str(script), "--gpus", "3")
    assert python(*command).stdout == "2x1GiB:shapes ['--gpus', '3']\n"
    command = ("-m", "balance_shim", "simulate", "--gpus=2x1GiB", "-c", show)
    assert python(*command).stdout == "2x1GiB []\n"


@pytest.mark.parametrize(
    "arguments", [("--gpus", "4xmuch", "train.py"), ("train.py",), ("--gpus",), ("--gpus", "4x1GiB")]
)
def test_simulate_refuses(arguments):
    """Devices that cannot be read, or nothing to run: exit code 2 before anything is started."""
    done = python("-m", "balance_shim", "simulate", *arguments)
    assert done.returncode == 2 and "balance-shim" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("simulate", "-h"), ("env", "--help")])
def test_help(arguments):
    """Each command explains itself."""
    done = python("-m", "balance_shim", *arguments)
    assert done.returncode == 0 and done.stdout.startswith("usage: balance-shim") and done.stderr == ""
