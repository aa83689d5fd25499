"""`balance-shim top`: what it shows of a record that grows, in a terminal and where there is none."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest

from balance_shim.cli.main import main
from balance_shim.report.live import view
from balance_shim.report.live.follow import Follower
from tests import processes
from tests.report import folders

HAS_RICH = importlib.util.find_spec("rich") is not None


def test_a_record_is_followed_line_by_line(tmp_path):
    """Half a line waits for its rest; peaks stay; a newer training in the same folder takes its place."""
    follower = Follower(str(tmp_path / "later"))
    assert follower.look() is None  # the folder is not there yet
    path = folders.write(tmp_path / "later", **{"run.json": None, "memory.jsonl": None}) / "memory.jsonl"
    assert follower.look() is None
    text = folders.lines([folders.step(1, peak=800), folders.step(2, peak=600)])
    path.write_text(text[:-30])
    snapshot = follower.look()
    assert snapshot.step == 1 and snapshot.devices[0].peak == 800 * folders.MIB
    path.write_text(text)
    snapshot = follower.look()
    assert snapshot.step == 2 and snapshot.devices[0].now == 300 * folders.MIB
    assert snapshot.devices[0].peak == 800 * folders.MIB and snapshot.tokens_per_second == 512
    (tmp_path / "later" / "memory-2.jsonl").write_text(folders.lines([folders.step(1, peak=500)]))
    assert follower.look().devices[0].peak == 500 * folders.MIB


def test_ranks_are_shown_together(tmp_path):
    """Devices of each rank, tokens of all; ranks beyond those of the latest run are not shown."""
    more = {f"memory-rank{rank}.jsonl": folders.lines([folders.step(1)]) for rank in (1, 2)}
    folders.write(tmp_path, **more, **{"run.json": json.dumps(folders.run(ranks=2))})
    snapshot = Follower(str(tmp_path)).look()
    assert [(device.rank, device.name) for device in snapshot.devices] == [
        (rank, name) for rank in (0, 1) for name in folders.DEVICES
    ]
    assert snapshot.ranks == 2 and snapshot.tokens_per_second == 1024


def test_where_there_is_no_terminal(tmp_path, capsys):
    """One table and exit code 0; one line and 2 where there is nothing to show."""
    grows = {"kind": "kept", "since": 3, "text": "memory grows"}
    steps = [folders.step(1, findings=[grows]), folders.step(2, unfinished=True)]
    folders.write(tmp_path / "run", **{"memory.jsonl": folders.lines(steps)})
    assert main(["top", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "cuda:1" in line)
    assert row.split() == ["cuda:1", "350.0", "MiB", "710.0", "MiB", "900.0", "MiB", "1000.0", "MiB", "-"]
    assert "memory grows" in shown and "did not finish" in shown and "\x1b" not in shown
    (tmp_path / "file").write_text("")
    for place in ("missing", "file", "."):
        assert main(["top", str(tmp_path / place), "--once"]) == 2
        output, errors = capsys.readouterr()
        assert not output and len(errors.splitlines()) == 1


def test_why_a_step_failed_and_why_there_is_no_record(tmp_path, capsys):
    """An out-of-memory is named under the table; where a training runs on CPUs, no advice to switch the monitor on."""
    failed = folders.lines([folders.step(1), folders.step(2, unfinished=True)])
    logged = folders.lines([folders.event("out of memory", "text", headline="out of memory on cuda:1")])
    folder = folders.write(tmp_path / "failed", **{"memory.jsonl": failed, "events.jsonl": logged})
    assert main(["top", "--once", str(folder)]) == 0
    assert "the last step did not finish: out of memory on cuda:1" in capsys.readouterr().out
    run = json.dumps(folders.run(on_accelerator=False))
    folder = folders.write(tmp_path / "on-cpus", **{"memory.jsonl": None, "plan.json": None, "run.json": run})
    assert main(["top", "--once", str(folder)]) == 2
    assert "this training runs on CPUs" in capsys.readouterr().err


def test_without_rich(tmp_path, monkeypatch, capsys):
    """A terminal gets one line that names the package and the way without it."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["top", str(folders.write(tmp_path))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install" in line and "--once" in line


@pytest.mark.skipif(not HAS_RICH, reason="the live view needs rich")
@pytest.mark.parametrize("columns", [80, 200])
def test_in_a_terminal(tmp_path, columns):
    """Each line fits, colour is off under NO_COLOR, the cursor comes back, and Ctrl-C ends it with 0."""
    folders.write(tmp_path)
    shown, code = _in_terminal(tmp_path, columns, NO_COLOR="1")
    assert code == 0 and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l") and "Traceback" not in shown
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", shown)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("cuda:1") and line.endswith("-") and "1000.0 MiB" in line for line in lines)
    assert any(line.startswith("step 6,") for line in lines)


@pytest.mark.skipif(not HAS_RICH, reason="the live view needs rich")
@pytest.mark.parametrize(
    ("columns", "heads"),
    [(30, "device now peak"), (42, "device now peak capacity"), (60, "device now peak predicted capacity busy")],
)
def test_a_narrow_terminal_has_fewer_columns(tmp_path, columns, heads):
    """None of the figures is cut; those that matter least are left out."""
    from rich.console import Console

    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(view.rich_view(Follower(str(folders.write(tmp_path))).look(), columns, unicode=True))
    _, header, first, *_ = console.export_text().splitlines()
    assert header.split() == heads.split() and "…" not in first
    assert "350.0 MiB" in first and "700.0 MiB" in first


def _in_terminal(folder, columns, **variables):
    """Run the live view in a terminal, press Ctrl-C once it shows a device; return what it printed, and its code."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = processes.environment(processes.SHIM, TERM="xterm-256color", LANG="C.UTF-8", **variables)
    environ.pop("COLUMNS", None)
    command = [sys.executable, "-m", "balance_shim", "top", str(folder), "--interval", "0.2"]
    child = subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown, pressed, ends = "", False, time.monotonic() + 60
    while time.monotonic() < ends:
        if not select.select([ours], [], [], 0.2)[0]:
            continue
        with contextlib.suppress(OSError):  # the other side is closed
            shown += os.read(ours, 65536).decode("utf-8", "replace")
            if "cuda:1" in shown and not pressed:
                pressed = True
                child.send_signal(signal.SIGINT)
            continue
        break
    os.close(ours)
    return shown, child.wait(30)
