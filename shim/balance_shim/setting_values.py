"""The values of `BALANCE_*` variables, from text. A text that cannot be read raises, as `settings.read` expects.

Standard library only, and only modules that an interpreter has mostly loaded anyway: arming must cost next to nothing.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .units import GIB, parse_size

if TYPE_CHECKING:
    from .device_spec import SimulationSpec
    from .map_file import UserMap

INTERCEPTABLE = ("auto", "balanced", "balanced_low_0", "sequential", "none")


class Reserve(NamedTuple):
    """Head-room kept free on each device: a fixed number of bytes plus a fraction of the device's capacity.

    `least` is the least that is kept free on real CUDA devices: kernels that are loaded once they run, cuDNN, and what
    varied lengths fragment do not shrink with the card.
    """

    fixed: int = 0
    fraction: float = 0.0
    least: int = 0

    def of(self, capacity: int, has_runtime: bool = False) -> int:
        """Return the bytes to keep free on a device of `capacity` bytes.

        Args:
            has_runtime: whether a CUDA runtime shares the device; none does with simulated ones.
        """
        size = self.fixed + int(self.fraction * capacity)
        if has_runtime and capacity >= SMALLEST_CARD:
            size = max(size, min(self.least, int(LARGEST_LEAST * capacity)))
        return min(capacity, size)


SMALLEST_CARD = 2 * GIB  # no CUDA device in use is smaller; a plan for less is a trial
LARGEST_LEAST = 0.2  # of a device: on one so small little would be left, and little runs on it


_Choice = TypeVar("_Choice", bound=str)


def one_of(allowed: tuple[_Choice, ...]) -> Callable[[str], _Choice]:
    def parse(text: str) -> _Choice:
        for choice in allowed:
            if text.lower() == choice:
                return choice
        raise ValueError

    return parse


FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def flag(text: str) -> bool:
    return FLAGS[text.lower()]


def folder_or_off(text: str) -> str | None:
    """Return the full path of a folder, None for off; a word such as "1" or "true" names no folder."""
    switched_on = FLAGS.get(text.lower())
    if switched_on:
        raise ValueError
    return None if switched_on is False else os.path.abspath(os.path.expanduser(text))


def count(text: str) -> int:
    number = int(text)
    if not 1 <= number < 2**31:
        raise ValueError
    return number


def count_or_auto(text: str) -> int | str:
    return "auto" if text.lower() == "auto" else count(text)


def count_or_auto_or_off(text: str) -> int | str:
    return "off" if text.lower() == "off" else count_or_auto(text)


def intercept(text: str) -> frozenset[str]:
    values = frozenset(part.strip().lower() for part in text.split(","))
    if not values <= set(INTERCEPTABLE):
        raise ValueError
    return values


def _device_index(text: str) -> int:
    """Read "1", "cuda:1" or "npu:1"."""
    kind, _, index = text.strip().rpartition(":")
    if not index.isdigit() or not (kind.isalpha() or not kind):
        raise ValueError
    return int(index)


def max_memory(text: str) -> int | dict[int, int] | None:
    if text.startswith("{"):
        import json

        pairs = json.loads(text, object_pairs_hook=list)
    elif "=" in text:
        pairs = [part.split("=") for part in text.split(",")]
    else:
        return parse_size(text)
    # accelerate's max_memory carries "cpu" and "disk" too; a plan never spills there, so they say nothing here.
    # As in accelerate, 0 keeps a device free.
    sizes = [(key.strip(), 0 if str(size).strip() == "0" else parse_size(str(size))) for key, size in pairs]
    caps = [(_device_index(key), size) for key, size in sizes if key not in ("cpu", "disk")]
    if not sizes or len(dict(caps)) != len(caps):
        raise ValueError
    return dict(caps) or None


def reserve(text: str) -> Reserve:
    if text.endswith("%"):
        percent = float(text[:-1])
        if not 0 <= percent < 100:
            raise ValueError
        return Reserve(fraction=percent / 100)
    return Reserve(fixed=0 if text == "0" else parse_size(text))


def report(text: str) -> str:
    if text.lower() == "text":
        return "text"
    folder = folder_or_off(text)
    if folder is None:
        return "off"
    ancestor = folder
    while not os.path.lexists(ancestor):  # what does not exist yet is made when there is something to report
        ancestor = os.path.dirname(ancestor)
    if not (os.path.isdir(ancestor) and os.access(ancestor, os.W_OK)):
        raise ValueError
    return folder


def optimizer(text: str) -> str:
    from .optimizers import OPTIMIZERS

    return one_of(tuple(OPTIMIZERS))(text)


def checkpointing(text: str) -> bool | str:
    return "auto" if text.lower() == "auto" else flag(text)


def cache(text: str) -> str | None:
    folder = folder_or_off(text)
    if folder is not None and os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError
    return folder


def device_map(text: str) -> "UserMap":
    from . import map_file  # needs json: only those who bring a map pay for it

    return map_file.read(text)


def zero_config(text: str) -> dict[str, Any]:
    from . import zero_config_file  # needs json

    return zero_config_file.read(text)


def simulate(text: str) -> "SimulationSpec":
    from .device_spec import parse_spec

    return parse_spec(text)
