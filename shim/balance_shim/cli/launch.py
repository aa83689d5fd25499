"""Starts the user's program with the shim in its environment, in this very process: exit code and signals are its own.

`exec` rather than a child process, because a parent that is killed leaves its child, and the ranks below, running.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from .. import expandable_segments

INJECTION = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "injection")


class LaunchError(Exception):
    """The program cannot be started. `code` is the exit code that a shell or Python would give for it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Program(NamedTuple):
    """The command to execute: the file, and all its arguments from the zeroth on."""

    file: str
    arguments: tuple[str, ...]


def resolve(target: Sequence[str]) -> Program:
    """Return the program that `target`, the words after `balance-shim run`, means.

    * Leading options are Python's: `-m pkg ...`, `-u train.py ...`, `-c code`.
    * A file that Python runs: `train.py`, a folder or archive with `__main__`, any file of text without a `#!` line.
    * A file that runs by itself: one with a `#!` line, or a binary.
    * A name without a slash, like a shell: a program beside this interpreter, then on `PATH`.

    Raises:
        LaunchError: there is no such file or program, or it may not be executed.
    """
    if not target:
        raise LaunchError("nothing to run: give a script, -m and a module, or a program", 2)
    first, *rest = target
    if first.startswith("-"):  # "-" alone is standard input
        _check_python_options(target)
        return _python(target)
    is_name = os.sep not in first and not first.endswith((".py", ".pyz"))
    program = _find_program(first) if is_name else None
    if program is not None:
        return Program(program, (first, *rest))
    if not os.path.exists(first):
        # Python says 2 for a script that it cannot open, a shell 127 for a program that it cannot find.
        is_script = first.endswith((".py", ".pyz"))
        raise LaunchError(f"{first}: no such {'file' if is_script else 'program or file'}", 2 if is_script else 127)
    if os.path.isdir(first) or first.endswith((".py", ".pyc", ".pyz")) or _is_for_python(first):
        return _python(target)
    if not os.access(first, os.X_OK):
        raise LaunchError(f"{first}: permission denied (it is not executable)", 126)
    return Program(first, (first, *rest))


def injected(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` that arms every Python started below, in mode `balanced` unless it names another.

    Only our folder goes on `PYTHONPATH`. It finds the package around itself where an interpreter does not have it, so
    the site-packages of this interpreter need not be there: they would come before the standard library of others.
    """
    inherited = environ.get("PYTHONPATH", "")
    # An empty part means the current folder; an empty or missing variable means nothing.
    paths = [path for path in inherited.split(os.pathsep) if path != INJECTION] if inherited else []
    changed = {"PYTHONPATH": os.pathsep.join([INJECTION, *paths])}
    if not (environ.get("BALANCE_MODE", "").strip() or environ.get("BALANCE_DEVICE_MAP", "").strip()):
        changed["BALANCE_MODE"] = "balanced"
    return {**environ, **expandable_segments.variables(environ), **changed}


def execute(program: Program, environ: Mapping[str, str]) -> NoReturn:
    """Become `program`.

    Raises:
        LaunchError: the system refuses to execute it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is where the caller closed it
            stream.flush()
    try:
        os.execve(program.file, program.arguments, environ)
    except OSError as error:
        raise LaunchError(f"{program.arguments[0]}: {error.strerror}", 126) from error


def _python(arguments: Sequence[str]) -> Program:
    return Program(sys.executable, (sys.executable, *arguments))


def _check_python_options(options: Sequence[str]) -> None:
    """Refuse options with which Python ignores the files that arm the shim."""
    is_argument = False
    for option in options:
        if is_argument:
            is_argument = False
            continue
        if option.startswith("--"):
            is_argument = option == "--check-hash-based-pycs"
            continue
        if not option.startswith("-") or option == "-":
            return
        for place, letter in enumerate(option[1:], start=2):
            if letter in "IES":
                why = f"python -{letter} ignores PYTHONPATH or sitecustomize, which arms the shim"
                raise LaunchError(f"{why}; import balance_shim in the script instead", 2)
            if letter in "mc":
                return
            if letter in "WX":  # the rest of this word is its argument, or else the next word
                is_argument = place == len(option)
                break


def _find_program(name: str) -> str | None:
    own_folder = os.path.dirname(sys.executable)  # an environment that nobody activated still has its own programs
    return shutil.which(name, path=own_folder) or shutil.which(name)


def _is_for_python(path: str) -> bool:
    """Whether Python runs the file: an archive, or a text. A `#!` line or a binary the system runs by itself."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PK"):
        return True
    return not start.startswith(b"#!") and b"\0" not in start
