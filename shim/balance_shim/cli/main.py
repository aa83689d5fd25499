"""The command `balance-shim`. Each subcommand is a function that returns the exit code."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from . import launch

DESCRIPTION = """\
Use the memory of all GPUs when you train, without changing the training script.

commands:
  run TARGET ...                      run a program with the shim armed
  simulate --gpus DEVICES TARGET ...  run it on simulated devices and print the peak of each
  plan MODEL --gpus DEVICES           plan the training of a model from its config, without weights or devices
  report FOLDER                       write one HTML page on a run, from the folder of BALANCE_REPORT
  top FOLDER                          show the memory of a training while it runs
  doctor                              examine versions, seams, devices, links, NCCL; name problems and remedies
  env                                 list the BALANCE_* variables and what they are set to

TARGET is a script, -m and a module, or a program such as swift, each with its own arguments.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. `run` and `simulate` become the program and do not return."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):  # values of variables may hold what this terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="balance-shim",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="balance-shim [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"balance-shim {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    return COMMANDS[command](argv[1:])


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="balance-shim run",
        usage="balance-shim run TARGET ...",
        description="Run a script, a module (-m pkg) or a program with the shim armed. Options in front of a script "
        "are Python's. Mode `balanced`, unless BALANCE_MODE or BALANCE_DEVICE_MAP is set.",
    )
    if arguments[:1] in (["-h"], ["--help"]):
        parser.parse_args(arguments)
    return _become(arguments, {})


def _simulate(arguments: list[str]) -> int:
    from ..device_spec import FORMS, parse_spec

    parser = argparse.ArgumentParser(
        prog="balance-shim simulate",
        usage="balance-shim simulate --gpus DEVICES [--shapes-only] TARGET ...",
        description="Run a script, a module or a program, with the shim armed, on simulated devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", required=True, metavar="DEVICES", help=FORMS.replace("%", "%%"))
    parser.add_argument(
        "--shapes-only", action="store_true", help="tensors have shapes but no values, for large models"
    )
    own_options, target = _split(arguments, flags=("--shapes-only", "-h", "--help"), with_value=("--gpus",))
    options = parser.parse_args(own_options)
    spec = options.gpus.strip()
    if options.shapes_only and not spec.endswith(":shapes"):
        spec += ":shapes"
    try:
        parse_spec(spec)
    except ValueError as error:
        return _fail(f"--gpus {error}", 2)
    return _become(target, {"BALANCE_SIMULATE": spec})


def _plan(arguments: list[str]) -> int:
    from . import plan

    return plan.run(arguments)


def _report(arguments: list[str]) -> int:
    from . import report

    return report.run(arguments)


def _top(arguments: list[str]) -> int:
    from . import top

    return top.run(arguments)


def _env(arguments: list[str]) -> int:
    from ..language.chinese_variables import VARIABLES as CHINESE
    from ..language.message import Message
    from ..language.speaker import language_of, speaker
    from ..output import show
    from ..settings import VARIABLES, read

    argparse.ArgumentParser(
        prog="balance-shim env", description="List the BALANCE_* variables: value, allowed values, meaning."
    ).parse_args(arguments)
    settings, problems = read(os.environ)
    texts = {}
    for variable in VARIABLES:
        pairs = zip((variable.allowed, variable.default, variable.meaning), CHINESE[variable.name], strict=True)
        texts.update({english: chinese for english, chinese in pairs if english})
    say = speaker(language_of(os.environ, settings.lang), sys.stdout, texts)
    for variable in VARIABLES:
        value = os.environ.get(variable.name, "").strip()
        unset = Message("{name} (not set: {default})", name=variable.name, default=variable.default or Message("none"))
        show(f"{variable.name} = {value}" if value else say(unset))
        show(f"    {say(variable.meaning)}")
        show(say(Message("    allowed: {values}", values=variable.allowed)))
    for problem in problems:
        kind = Message("error: {line}", line=problem.message)
        show(say(kind if problem.fatal else Message("warning: {line}", line=problem.message)))
    return 1 if any(problem.fatal for problem in problems) else 0


def _doctor(arguments: list[str]) -> int:
    from ..doctor import command

    return command.run(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run, "simulate": _simulate, "plan": _plan, "report": _report, "top": _top, "doctor": _doctor, "env": _env,
}  # fmt: skip


def _split(arguments: list[str], flags: tuple[str, ...], with_value: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return (our options, target). argparse would take the target's options for its own, or refuse a leading `-m`."""
    place = 0
    while place < len(arguments):
        if arguments[place] in with_value:
            place += 2
        elif arguments[place] in flags or arguments[place].startswith(tuple(f"{option}=" for option in with_value)):
            place += 1
        else:
            break
    return arguments[:place], arguments[place:]


def _become(target: list[str], variables: dict[str, str]) -> int:
    try:
        launch.execute(launch.resolve(target), launch.injected({**os.environ, **variables}))
    except launch.LaunchError as error:
        return _fail(str(error), error.code)


def _fail(message: str, code: int) -> int:
    print(f"balance-shim: {message}", file=sys.stderr)
    return code
