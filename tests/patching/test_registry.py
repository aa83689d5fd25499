"""The patch registry beside neighbours who patch, too."""

import pytest

from balance_shim import state
from balance_shim.patching import registry
from tests.patching import stand_in_library
from tests.processes import SHIM, code, output_of


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return stand_in_library.write(tmp_path_factory.mktemp("stand_in"))


ARMED = """
from prelude import *
import library.leaf as leaf
original = vars(leaf.Model)["from_pretrained"]
balance_shim.install()
import stand_in_seam as seam

def acted(call):
    before = len(seam.acted)
    call()
    return len(seam.acted) - before

def load():
    assert leaf.Model.from_pretrained("m", device_map="auto") == ["Model", "m", "auto"]
"""


def armed(text, library, **more):
    return output_of(ARMED + text, paths=(SHIM, library), **more)


def test_a_neighbour_that_takes_func_and_puts_it_back(library):
    """ms-swift takes `__func__`, patches for a while, and restores `classmethod(that)`: we are still there."""
    armed(
        """
from contextlib import contextmanager

@contextmanager
def patch_automodel():  # as swift/model/patcher.py does
    from_pretrained = leaf.Model.from_pretrained.__func__
    def patched(cls, *args, **kwargs):
        return from_pretrained(cls, *args, **kwargs)
    leaf.Model.from_pretrained = classmethod(patched)
    try:
        yield
    finally:
        leaf.Model.from_pretrained = classmethod(from_pretrained)

with patch_automodel():
    assert acted(load) == 1
assert acted(load) == 1
balance_shim.install()
assert acted(load) == 1
balance_shim.uninstall()
assert vars(leaf.Model)["from_pretrained"] is original
""",
        library,
    )


def test_disarmed_while_such_a_neighbour_is_at_work(library):
    """What ms-swift puts back after we have left is our function; it passes everything on, and arming again works."""
    armed(
        """
from_pretrained = leaf.Model.from_pretrained.__func__
leaf.Model.from_pretrained = classmethod(lambda cls, *args, **kwargs: from_pretrained(cls, *args, **kwargs))
balance_shim.uninstall()
assert acted(load) == 0
leaf.Model.from_pretrained = classmethod(from_pretrained)
assert acted(load) == 0
balance_shim.install()
assert acted(load) == 1
balance_shim.uninstall()
assert acted(load) == 0
""",
        library,
    )


def test_a_neighbour_on_top_when_we_leave(library):
    """Somebody who wrapped us is left alone; our layer below turns transparent and is never doubled."""
    armed(
        """
import functools
below = leaf.get_device_map
@functools.wraps(below)
def theirs(*args, **kwargs):
    return ["theirs", *below(*args, **kwargs)]
leaf.get_device_map = theirs
def call():
    assert leaf.get_device_map("m") == ["theirs", "m", None]
assert acted(call) == 1
balance_shim.uninstall()
assert leaf.get_device_map is theirs and acted(call) == 0
balance_shim.install()
assert acted(call) == 1
balance_shim.uninstall()
assert leaf.get_device_map is theirs and acted(call) == 0
""",
        library,
    )


def test_a_neighbour_that_puts_back_the_original(library):
    """Somebody who saw the class before us may undo us; a reload of the seam's module patches again."""
    armed(
        """
leaf.Model.from_pretrained = original
assert acted(load) == 0
seam.apply(leaf)
assert acted(load) == 1
balance_shim.uninstall()
assert vars(leaf.Model)["from_pretrained"] is original
""",
        library,
    )


def test_what_others_read_off_a_function(library):
    """Signature, name, documentation and source are the original's, for those who inspect or rewrite them."""
    armed(
        """
import inspect, pickle, textwrap
function = leaf.Model.from_pretrained
assert str(inspect.signature(function)) == "(name, *, device_map=None)"
assert function.__name__ == "from_pretrained" and function.__doc__ == "Load a model."
assert function.__qualname__ == "Model.from_pretrained" and function.__module__ == "library.leaf"
assert isinstance(vars(leaf.Model)["from_pretrained"], classmethod) and callable(function.__func__)
assert isinstance(vars(leaf.Model)["twice"], staticmethod)
assert pickle.loads(pickle.dumps(leaf.get_device_map)) is leaf.get_device_map
# Unsloth and axolotl rewrite what inspect.getsource gives and run it: they get the original, not our wrapper.
source = inspect.getsource(leaf.get_device_map)
assert source.startswith("def get_device_map(model, device_map=None):")
space = {}
exec(source.replace("[model", "['rewritten', model"), space)
leaf.get_device_map = space["get_device_map"]
assert leaf.get_device_map("m") == ["rewritten", "m", None]
balance_shim.uninstall()
assert leaf.get_device_map is space["get_device_map"]
""",
        library,
    )


def test_replacing_twice_changes_nothing(library):
    """The same seam applied again finds its patches standing."""
    armed(
        """
before = dict(vars(leaf.Model)), balance_shim.status().seams
seam.apply(leaf)
assert (dict(vars(leaf.Model)), balance_shim.status().seams) == before
assert [seam.target for seam in before[1]][0] == "library.leaf.Model.from_pretrained"
assert before[1][0].version == "1.2.3" and before[1][-1].target == "library.leaf.get_device_map"
""",
        library,
    )


def test_threads_replace_at_once(library):
    """However many threads apply the seam, one call acts once."""
    armed(
        """
import threading
gate = threading.Barrier(8)
balance_shim.uninstall()
def work():
    gate.wait()
    for _ in range(50):
        balance_shim.install()
        load()
        balance_shim.uninstall()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
balance_shim.uninstall()
assert vars(leaf.Model)["from_pretrained"] is original
balance_shim.install()
assert acted(load) == 1
""",
        library,
    )


def test_the_error_of_the_original_is_its_own(library):
    """An exception of the original passes unchanged, and the original has run once."""
    armed(
        """
try:
    leaf.Model.from_pretrained()
except TypeError as error:
    assert "missing 1 required positional argument: 'name'" in str(error)
else:
    raise AssertionError
""",
        library,
    )


@pytest.mark.parametrize(("owner", "name", "error"), [("leaf.Model", "nothing", "AttributeError"),
                                                      ("leaf", "__name__", "TypeError")])  # fmt: skip
def test_what_cannot_be_replaced(library, owner, name, error):
    """A missing attribute, or one that is no function, is refused."""
    text = f"registry = sys.modules['balance_shim.patching.registry']\nregistry.replace({owner}, '{name}', lambda f: f)"
    done = code(ARMED + text, paths=(SHIM, library))
    assert done.stderr.splitlines()[-1].startswith(error)


def test_a_neighbour_that_asks_for_the_signature_of_the_trainer():
    """ms-swift looks at signature and source of the Trainer's methods; TRL and it subclass the class."""
    pytest.importorskip("transformers")
    output_of(
        """
        import inspect
        import balance_shim
        from transformers.trainer import Trainer
        from balance_shim.patching import registry
        for name in ("train", "training_step"):
            assert registry.is_ours(vars(Trainer)[name])
        patched = inspect.signature(Trainer.train)
        names = Trainer.train.__code__.co_varnames
        source = inspect.getsource(Trainer.train)
        class Theirs(Trainer):
            def train(self, *args, **kwargs):
                return super().train(*args, **kwargs)
        balance_shim.uninstall()
        assert "resume_from_checkpoint" in patched.parameters and patched == inspect.signature(Trainer.train)
        assert source == inspect.getsource(Trainer.train) and names == Trainer.train.__code__.co_varnames
        """
    )


def test_without_wrapt_it_works_all_the_same(library):
    """With the folders on PYTHONPATH and nothing installed there may be no wrapt: one line, and the patches act."""
    text = """
import sys
sys.modules["wrapt"] = None
def call():
    assert leaf.get_device_map("m") == ["m", None]
assert acted(call) == 1
balance_shim.uninstall()
assert acted(call) == 0
"""
    done = code("import sys\nsys.modules['wrapt'] = None\n" + ARMED + text, paths=(SHIM, library))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "pip install wrapt" in done.stderr


def test_a_property_stays_one():
    """The getter of a property is patched in a property, and put back as it was."""

    class Owner:
        @property
        def place(self):
            """Where it is."""
            return 1

    before = vars(Owner)["place"]
    patch = registry.replace(Owner, "place", lambda original: lambda self: original(self) + 1)
    assert isinstance(vars(Owner)["place"], property) and Owner.place.__doc__ == before.__doc__
    assert registry.replace(Owner, "place", lambda original: original) is patch
    assert Owner().place == (2 if state.enabled() else 1)
    registry.restore((patch,))
    assert vars(Owner)["place"] is before and Owner().place == 1
