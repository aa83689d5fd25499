"""`balance-shim top`: the memory of a training in the terminal, while it runs."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..output import show

SHOWN, NOT_SHOWN = 0, 2
INTERVAL = 1.0  # seconds between two looks
DESCRIPTION = """\
Follow the record of a training under BALANCE_MONITOR=1, in the folder of BALANCE_REPORT or in the Trainer's output_dir:
for each device what is in tensors after the last step, the highest and the predicted peak, the capacity, and the busy
share (with ~ the plan's); speed of the last ten steps. In the bar, | is the predicted peak. Where the output is no
terminal, or with --once, one table is printed. NO_COLOR turns colour off.
"""


def run(arguments: Sequence[str]) -> int:
    """Run `balance-shim top` with these words; return the exit code."""
    options = _parser().parse_args(arguments)
    if os.path.exists(options.folder) and not os.path.isdir(options.folder):
        return _fail(f"{options.folder} is a file; name the folder that BALANCE_REPORT was set to")
    try:
        if options.once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            return _once(options.folder)
        return _follow(options.folder, options.interval)
    except OSError as error:
        return _fail(f"{options.folder}: cannot be read ({error.strerror or error})")
    except KeyboardInterrupt:
        return SHOWN


def _once(folder: str) -> int:
    from ..report.folder import ran_on_cpus
    from ..report.live import follow, view
    from ..report.texts import TOP

    snapshot = follow.Follower(folder).look()
    if snapshot is None and ran_on_cpus(folder):
        return _fail(TOP["no_accelerator"].format(folder=folder))
    if snapshot is None:
        fault = "has no memory.jsonl with a step in it" if os.path.isdir(folder) else "does not exist"
        return _fail(f"{folder} {fault}; train with BALANCE_REPORT={folder} BALANCE_MONITOR=1")
    show(view.plain(snapshot))
    return SHOWN


def _follow(folder: str, interval: float) -> int:
    from ..report.texts import TOP

    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        return _fail(TOP["no_rich"])
    from ..report.folder import ran_on_cpus
    from ..report.live import follow, view

    follower, console = follow.Follower(folder), Console()
    unicode = (console.encoding or "").lower().startswith("utf")

    def now() -> Any:
        snapshot = follower.look()
        if snapshot is None:
            return Text(TOP["no_accelerator" if ran_on_cpus(folder) else "waiting"].format(folder=folder))
        return view.rich_view(snapshot, console.width, unicode)

    live = Live(now(), console=console, auto_refresh=False)
    try:
        live.start(refresh=True)
        while True:
            time.sleep(interval)
            live.update(now(), refresh=True)
    finally:  # `with` would leave the cursor hidden where Ctrl-C comes while it starts
        live.stop()
        console.show_cursor()


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("allowed are 0.1 to 3600 seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balance-shim top",
        description=DESCRIPTION,
        epilog="Exit code: 0, also when Ctrl-C ends it; 2 if there is nothing to show.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of BALANCE_REPORT")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument(
        "--interval", type=_interval, default=INTERVAL, metavar="SECONDS", help=f"between two looks ({INTERVAL:g})"
    )
    return parser


def _fail(message: str) -> int:
    print(f"balance-shim top: {message}", file=sys.stderr)
    return NOT_SHOWN
