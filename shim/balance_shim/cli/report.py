"""`balance-shim report`: one HTML page from a folder of `BALANCE_REPORT`."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from .. import log
from ..errors import UsageError
from ..output import show

WRITTEN, NOT_WRITTEN = 0, 2
NAME = "report.html"
DESCRIPTION = """\
Write one HTML page on the latest run in FOLDER, which BALANCE_REPORT was set to: what was found and what to do about
it, predicted and measured memory, the device map, and a what-if table. It needs neither a server nor other files. The
training is planned again from the recorded config, without weights and accelerators, for the comparison with
transformers' "auto" and for the table.

Memory is measured only under BALANCE_MONITOR=1.
"""
EPILOG = """\
Exit code: 0 if the page was written, also from a folder of which parts are missing or damaged (a line on standard error
for each); 2 if not.
"""


def run(arguments: Sequence[str]) -> int:
    """Run `balance-shim report` with these words; return the exit code. Standard output has the path and no more."""
    options = _parser().parse_args(arguments)
    log.set_level("error")  # planning again logs what is about loading
    target = options.output or os.path.join(options.folder, NAME)
    try:
        _write(target, _page(options))
    except UsageError as error:
        _say(str(error))
        return NOT_WRITTEN
    except Exception as error:  # a folder that is damaged in a way that nobody has thought of
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _say(f"{options.folder}: cannot be shown ({reason}); please report this, with the folder")
        return NOT_WRITTEN
    show(target)
    return WRITTEN


def _page(options: argparse.Namespace) -> str:
    from ..report import folder

    run_folder = folder.read(options.folder)
    for remark in run_folder.remarks:
        _say(remark)

    from ..report import what_if
    from ..report.page import render
    from ..report.texts import PAGE

    skipped = what_if.Replanned(no_before=PAGE["skipped"], no_combinations=PAGE["skipped"])
    return render.page(run_folder, skipped if options.quick else what_if.replan(run_folder, options.trust_remote_code))


def _write(path: str, page: str) -> None:
    """Write the page under another name first, so that one that is there stays whole."""
    if os.path.isdir(path):
        raise UsageError(f"--output {path} is a folder; name a file")
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(part)
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another file with -o") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balance-shim report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of BALANCE_REPORT")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"the page (FOLDER/{NAME})")
    parser.add_argument(
        "--quick", action="store_true", help='plan nothing again: no comparison with "auto", no what-if table'
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    return parser


def _say(line: str) -> None:
    print(f"balance-shim report: {line}", file=sys.stderr)
