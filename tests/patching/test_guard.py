"""Fail-open, and what a seam that has moved leads to."""

import pytest

from tests.patching import stand_in_library
from tests.processes import SHIM, code

ATTEMPT = """
from prelude import *
from balance_shim.patching.guard import attempt
from balance_shim.errors import BalanceError
def fails(error):
    raise error
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return stand_in_library.write(tmp_path_factory.mktemp("stand_in"))


def test_a_failure_is_one_line_and_a_default(library):
    """What failed, how, and what happens now, in one line and once; the program goes on with the default."""
    call = "attempt('planning', fails, ValueError('a\\nb'), default=4, instead='all is well')"
    text = f"for _ in range(3):\n    print({call})"
    done = code(ATTEMPT + text, paths=(SHIM, library))
    assert done.stdout == "4\n4\n4\n"
    assert done.stderr == "balance_shim: warning: planning failed (ValueError: a b); all is well\n"


@pytest.mark.parametrize("error", ["BalanceError('no')", "KeyboardInterrupt()", "SystemExit(3)"])
def test_what_is_never_swallowed(library, error):
    """A request that cannot be met and the user's own interrupt go through."""
    text = """
try:
    attempt('planning', fails, wish)
except BaseException as raised:
    print(raised is wish)
"""
    done = code(f"{ATTEMPT}\nwish = {error}\n{text}", paths=(SHIM, library))
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_strict_raises_the_failure_itself(library):
    """With BALANCE_STRICT the very exception is raised, after a line that names what failed."""
    done = code(ATTEMPT + "attempt('planning', fails, KeyError('x'))", paths=(SHIM, library), BALANCE_STRICT="1")
    first, *_, last = done.stderr.splitlines()
    assert first == "balance_shim: error: planning failed (KeyError: 'x'); stopping because BALANCE_STRICT is set"
    assert last == "KeyError: 'x'" and done.returncode == 1


MOVED = """
from balance_shim.patching import registry
from balance_shim.patching.guard import SeamMoved

def apply(module):
    registry.replace(module.Model, "from_pretrained", lambda original: original)
    raise {error}
"""
USE = """
from prelude import *
balance_shim.install()
import library.leaf as leaf
assert balance_shim.status().seams == () and "__wrapped__" not in vars(vars(leaf.Model)["from_pretrained"].__func__)
print(leaf.Model.from_pretrained("m"))
"""


def test_a_seam_that_has_moved(tmp_path):
    """An unknown version gives one line with what moved and what is known to work; nothing stays half patched."""
    seam = MOVED.format(error="SeamMoved('library.leaf.make_map', '9.0')")
    done = code(USE, paths=(SHIM, stand_in_library.write(tmp_path, seam=seam)))
    assert done.stdout == "['Model', 'm', None]\n"
    assert done.stderr == (
        "balance_shim: warning: library 9.0 has no library.leaf.make_map, which balance_shim patches (known to work: "
        "library 1.0 to 1.2); continuing without balance_shim\n"
    )


def test_a_seam_that_has_moved_when_strict(tmp_path):
    """BALANCE_STRICT makes it an error at the import."""
    seam = MOVED.format(error="SeamMoved('library.leaf.make_map', '9.0')")
    done = code(USE, paths=(SHIM, stand_in_library.write(tmp_path, seam=seam)), BALANCE_STRICT="1")
    assert done.returncode == 1 and "SeamMoved: library.leaf.make_map" in done.stderr


def test_a_seam_that_fails(tmp_path):
    """A seam that breaks is taken back whole; the library runs as it is."""
    done = code(USE, paths=(SHIM, stand_in_library.write(tmp_path, seam=MOVED.format(error="ZeroDivisionError('x')"))))
    assert done.stdout == "['Model', 'm', None]\n"
    assert done.stderr == (
        "balance_shim: warning: patching library.leaf failed (ZeroDivisionError: x); continuing without balance_shim\n"
    )
