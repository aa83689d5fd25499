"""Device maps as JSON: the users' files (layer name -> device), and the ones that the shim writes."""

import json
import os
from typing import Any, NamedTuple

from .errors import DeviceMapError

DeviceMap = dict[str, int | str]
OFFLOADED = ("cpu", "disk")
ACCELERATOR_TYPES = ("cuda", "npu", "xpu", "mlu", "musa", "hpu", "sdaa")
LARGEST_FILE = 16 << 20
VALUES = 'a device index such as 1, "cuda:1", "cpu" or "disk"'


class UserMap(NamedTuple):
    """A map as its author wrote it, and where it came from, for messages."""

    entries: DeviceMap
    source: str


def read(text: str) -> UserMap:
    """Return the map that `BALANCE_DEVICE_MAP` gives.

    Args:
        text: the path of a JSON file, or JSON itself.

    Raises:
        DeviceMapError: no such file, not JSON, or something that is not a map of names to devices.
    """
    if text.lstrip().startswith(("{", "[")):
        source, content = "BALANCE_DEVICE_MAP", text
    else:
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        source = f"BALANCE_DEVICE_MAP={shown if shown.isprintable() else repr(shown)}"
        content = _content(os.path.expanduser(text), source)
    try:
        raw = json.loads(content, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        message = f"{source}: not JSON, line {error.lineno} column {error.colno}: {error.msg}"
        raise DeviceMapError(message) from None
    except ValueError as error:  # an integer of thousands of digits
        raise DeviceMapError(f"{source}: cannot be parsed as JSON: {error}") from None
    except RecursionError:
        raise DeviceMapError(f"{source}: nested too deep to be a device map") from None
    if not isinstance(raw, _Pairs):
        raise DeviceMapError(f"{source}: a device map is a JSON object of layer name -> device, not {_kind(raw)}")
    if not raw:
        raise DeviceMapError(f'{source}: the map is empty; {{"": 0}} places a whole model on device 0')
    device_map: DeviceMap = {}
    for name, value in raw:
        device = _device(value)
        if device is None:
            raise DeviceMapError(f"{source}: {name!r} is mapped to {_kind(value)}, which is not {VALUES}")
        if device_map.setdefault(name, device) != device:
            raise DeviceMapError(f"{source}: {name!r} is given twice, for {device_map[name]} and for {device}")
    return UserMap(device_map, source)


def write(device_map: DeviceMap, path: str) -> None:
    """Write `device_map` so that transformers, ms-swift's `--device_map` and `BALANCE_DEVICE_MAP` read it unchanged.

    A regular file appears whole or not at all. /dev/stdout, /dev/null or a pipe is written to and stays.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(device_map, indent=2) + "\n")
        return
    path = os.path.realpath(path)  # a link goes on pointing to it
    unfinished = f"{path}.{os.getpid()}"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(device_map, indent=2) + "\n")
    os.replace(unfinished, path)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated names, which a dict would hide."""


def _content(path: str, source: str) -> str:
    try:
        # Not a pipe, which would be waited for, or a device, which may have no end.
        if os.path.exists(path) and not os.path.isfile(path):
            raise DeviceMapError(f"{source}: {'is a folder' if os.path.isdir(path) else 'is not a regular file'}")
        with open(path, encoding="utf-8-sig") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise DeviceMapError(f"{source}: larger than {LARGEST_FILE >> 20} MiB, too large for a device map")
        return content
    except UnicodeDecodeError as error:
        raise DeviceMapError(f"{source}: not a text file (byte {error.start} is not UTF-8)") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DeviceMapError(f"{source}: cannot be read: {reason}") from None


def _device(value: Any) -> int | str | None:
    """Return the index, "cpu" or "disk" that `value` means, or None. Any accelerator's name will do: "npu:1" is 1."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, int):
        return value if value >= 0 else None
    kind, colon, index = value.strip().lower().rpartition(":")
    if index in OFFLOADED and not kind:
        return index
    if colon and kind not in ACCELERATOR_TYPES:
        return None
    if index.isascii() and index.isdigit() and len(index) < 6:
        return int(index)
    return 0 if not colon and index in ACCELERATOR_TYPES else None


def _kind(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "an object"
    return "a list" if isinstance(value, list) else json.dumps(value)
