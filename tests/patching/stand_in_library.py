"""A library in miniature, with a seam for it: what hooks and patches do shows without seconds of real imports."""

from __future__ import annotations

from pathlib import Path

LIBRARY = {
    "library/__init__.py": "__version__ = '1.2.3'\n",
    "library/leaf.py": '''
class Model:
    @classmethod
    def from_pretrained(cls, name, *, device_map=None):
        """Load a model."""
        return [cls.__name__, name, device_map]

    @staticmethod
    def twice(number):
        return 2 * number

    def forward(self, hidden):
        return hidden + 1


class Special(Model):
    pass


def get_device_map(model, device_map=None):
    return [model, device_map]
''',
    # Counts how often the wrapper acts in one call, which must never be more than once.
    "stand_in_seam.py": """
from balance_shim.patching import registry

acted = []

def around(original):
    def wrapper(*args, **kwargs):
        acted.append(original.__name__)
        return original(*args, **kwargs)
    return wrapper

def apply(module):
    registry.replace(module.Model, "from_pretrained", around)
    registry.replace(module.Model, "twice", around)
    registry.replace(module.Model, "forward", around)
    registry.replace(module.Special, "forward", around)
    registry.replace(module, "get_device_map", around)
""",
    # What every test of them begins with: the table of seams holds the stand-in only.
    "prelude.py": """
import os, sys
os.environ["BALANCE_MODE"] = "off"  # importing does not arm; the test does
from balance_shim import arming, seams
import balance_shim
del os.environ["BALANCE_MODE"]
seams.SEAMS.clear()
seams.SEAMS["library.leaf"] = "stand_in_seam"
seams.KNOWN_TO_WORK["library"] = ("1.0", "1.2")
""",
}


def write(folder: Path, **changes: str) -> Path:
    """Write the library into `folder`, with other contents for the files named in `changes` (`leaf`, `seam`)."""
    names = {"leaf": "library/leaf.py", "seam": "stand_in_seam.py"}
    files = {**LIBRARY, **{names[name]: text for name, text in changes.items()}}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
