"""The import hook: it fires after a module has run, and leaves no trace in it."""

import pytest

from tests.processes import SHIM, code, output_of

HOOK = """
import sys
import os
os.environ["BALANCE_MODE"] = "off"
from balance_shim.patching import import_hooks as hooks
fired = []
def note(module):
    fired.append((module.__name__, hasattr(module, "last_line")))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "leaf.py").write_text("import sys\ndef f():\n    return 1\nlast_line = True\n")
    return tmp_path


def with_hook(text, folder, **more):
    return output_of(HOOK + text, paths=(SHIM, folder), **more)


def test_fires_after_the_body(folder):
    """The callback sees the whole module, once, and the module sees the loader it would have without us."""
    with_hook(
        """
import importlib.util, importlib, inspect, pickle
plain = importlib.util.find_spec("leaf")
hooks.watch("leaf", note)
hooks.watch("leaf", note)
assert "leaf" not in sys.modules and not fired
import leaf
assert fired == [("leaf", True)]
assert type(leaf.__loader__) is type(plain.loader) and leaf.__spec__.loader is leaf.__loader__
assert type(leaf.__spec__) is type(plain) and leaf.__spec__.__dict__.keys() == plain.__dict__.keys() | {"_initializing"}
assert inspect.getsource(leaf.f) == "def f():\\n    return 1\\n"
assert pickle.loads(pickle.dumps(leaf.f)) is leaf.f
importlib.reload(leaf)
assert fired == [("leaf", True)] * 2 and type(leaf.__loader__) is type(plain.loader)
""",
        folder,
    )


def test_fires_at_once_for_what_is_there(folder):
    """A module imported before is reported when somebody starts to watch it."""
    with_hook("import leaf; hooks.watch('leaf', note); assert fired == [('leaf', True)]", folder)


def test_waits_for_a_module_that_is_half_way(folder):
    """Armed from inside a module's body, the callback comes when the body is done, and the spec is an ordinary one."""
    (folder / "leaf.py").write_text("import arms\nlast_line = True\n")
    (folder / "arms.py").write_text("from __main__ import hooks, note\nhooks.watch('leaf', note)\n")
    with_hook(
        """
import leaf
assert fired == [("leaf", True)], fired
assert type(leaf.__spec__) is type(sys.__spec__) and leaf.__spec__._initializing is False
""",
        folder,
    )


def test_a_half_way_module_that_fails_is_not_reported(folder):
    """An import that breaks after somebody began to watch it fires when it succeeds, not before."""
    (folder / "leaf.py").write_text("import arms\nif arms.broken:\n    raise ValueError\nlast_line = True\n")
    (folder / "arms.py").write_text("from __main__ import hooks, note\nhooks.watch('leaf', note)\nbroken = True\n")
    with_hook(
        """
try:
    import leaf
except ValueError:
    pass
assert not fired
sys.modules["arms"].broken = False
import leaf
assert fired == [("leaf", True)], fired
""",
        folder,
    )


def test_a_half_way_module_of_another_thread(folder):
    """One thread imports slowly, another starts to watch: the callback comes once, after the body."""
    (folder / "leaf.py").write_text("import __main__\n__main__.begun.set()\n__main__.go_on.wait()\nlast_line = True\n")
    with_hook(
        """
import threading
begun, go_on = threading.Event(), threading.Event()
thread = threading.Thread(target=__import__, args=("leaf",))
thread.start()
begun.wait()
hooks.watch("leaf", note)
assert not fired
go_on.set()
thread.join()
assert fired == [("leaf", True)], fired
""",
        folder,
    )


def test_many_threads_import_and_watch(folder):
    """Threads that import, watch and stop watching at once neither wait for each other for ever nor lose a callback."""
    (folder / "other.py").write_text("import leaf\nlast_line = True\n")
    (folder / "another.py").write_text("")
    (folder / "leaf.py").write_text("import time\ntime.sleep(0.05)\nimport other\nlast_line = True\n")
    with_hook(
        """
import threading
callbacks = [lambda module, number=number: fired.append((module.__name__, number)) for number in range(8)]
gate = threading.Barrier(16)
def work(number):
    gate.wait()
    if number % 2:
        __import__(("leaf", "other")[number // 2 % 2])
    else:
        hooks.watch("leaf", callbacks[number // 2])
        hooks.watch("other", callbacks[number // 2])
threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join(20)
assert not any(thread.is_alive() for thread in threads)
import leaf, other
# A module that was being found while the watch began is seen at the next import at the latest.
import another
assert sorted(fired) == [(name, number) for name in ("leaf", "other") for number in range(8)], fired
""",
        folder,
    )


def test_unwatch_leaves_the_import_system_as_it_was(folder):
    """With nothing watched any more there is no finder of ours, and nothing fires."""
    with_hook(
        """
before = list(sys.meta_path)
hooks.watch("leaf", note)
assert sys.meta_path[1:] == before
hooks.unwatch("leaf", note)
assert sys.meta_path == before
hooks.unwatch("leaf", note)
import leaf
assert not fired
""",
        folder,
    )


def test_a_failing_callback_does_not_break_the_import(folder):
    """A failure in a callback is one line on standard error; the module is there."""
    text = HOOK + "hooks.watch('leaf', lambda module: 1 / 0)\nimport leaf\nprint(leaf.last_line)"
    done = code(text, paths=(SHIM, folder))
    assert done.stdout == "True\n"
    assert done.stderr.count("\n") == 1 and "a hook on leaf failed (ZeroDivisionError" in done.stderr


def test_a_failing_callback_when_strict(folder):
    """BALANCE_STRICT lets the failure through, with a line that says what failed."""
    text = HOOK + "hooks.watch('leaf', lambda module: 1 / 0)\nimport leaf"
    done = code(text, paths=(SHIM, folder), BALANCE_STRICT="1")
    assert done.returncode == 1
    assert "a hook on leaf failed" in done.stderr and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_request_that_cannot_be_met_stops_the_import(folder):
    """A BalanceError in a callback is the importer's to see."""
    text = """
from balance_shim.errors import BalanceError
def refuse(module):
    raise BalanceError("no")
hooks.watch("leaf", refuse)
try:
    import leaf
except BalanceError:
    print("refused", "leaf" in sys.modules)
"""
    assert with_hook(text, folder) == "refused False"


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_another_hook_on_the_same_module(folder, first):
    """wrapt's hooks and ours both fire, whoever came first, and the loader in the end is the real one."""
    pytest.importorskip("wrapt")
    with_hook(
        f"""
import wrapt
theirs = []
def ours(): hooks.watch("leaf", note)
def other(): wrapt.register_post_import_hook(theirs.append, "leaf")
for put in ((ours, other) if {first == "ours"} else (other, ours)): put()
import leaf
assert fired == [("leaf", True)] and theirs == [leaf], (fired, theirs)
assert type(leaf.__loader__).__name__ == "SourceFileLoader", leaf.__loader__
assert type(leaf.__spec__.loader).__name__ == "SourceFileLoader"
""",
        folder,
    )


def test_modules_from_an_archive(folder):
    """zipimport shares one loader among all modules of an archive; only the watched one is reported."""
    with_hook(
        """
import zipfile, os
archive = os.path.join(os.path.dirname(os.path.abspath(sys.path[2])), "archive.zip")
with zipfile.ZipFile(archive, "w") as file:
    file.writestr("zipped.py", "last_line = True")
    file.writestr("beside.py", "")
sys.path.insert(0, archive)
hooks.watch("zipped", note)
import beside, zipped
assert fired == [("zipped", True)]
assert type(zipped.__loader__).__name__ == "zipimporter" and zipped.__loader__ is beside.__loader__ or True
os.remove(archive)
""",
        folder,
    )


def test_modules_from_a_finder_of_its_own(folder):
    """An editable install brings a finder; one that is behind ours, or put in front later, finds as before."""
    with_hook(
        """
import importlib.util, os
path = os.path.join(sys.path[2], "leaf.py")
class Editable:
    asked = 0
    @classmethod
    def find_spec(cls, name, path_=None, target=None):
        cls.asked += 1
        if name == "editable":
            return importlib.util.spec_from_file_location(name, path)
hooks.watch("editable", note)
hooks.watch("missing", note)
sys.meta_path.append(Editable)
import editable
assert fired == [("editable", True)]
try:
    import missing
except ModuleNotFoundError as error:
    assert error.name == "missing"
""",
        folder,
    )


def test_those_who_only_look(folder):
    """Asking for a watched module's spec, running it with -m's machinery and reading its source all work."""
    with_hook(
        """
import importlib.util, runpy, pkgutil, copy
hooks.watch("leaf", note)
spec = importlib.util.find_spec("leaf")
assert "def f" in spec.loader.get_source("leaf") and spec.loader.get_code("leaf") and copy.copy(spec.loader)
assert runpy.run_module("leaf")["last_line"] and not fired
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert fired == [("leaf", True)]
""",
        folder,
    )
