"""Small results on disk, keyed by everything that they depend on; stale or damaged entries are recomputed.

A file holds the key in full and a checksum of the content. It is trusted when both are right, and written under
another name first, so that two processes, or one that is killed, leave nothing half-written under the final one.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import __version__, log

FORMAT = 1
MOST_FILES = 400  # a few kilobytes each; the oldest go first


def folder_of(setting: str | None) -> Path | None:
    """Return the folder that `Settings.cache` means; None for no cache."""
    if setting is None:
        return None
    if setting:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "balance_shim"
    try:
        return Path.home() / ".cache" / "balance_shim"
    except RuntimeError:  # a container's user whom nobody knows, without HOME
        return None


def digest(*parts: Any) -> str:
    """Return a key for `parts`, which have to be JSON, of this version of the shim."""
    text = json.dumps([FORMAT, __version__, _own_source(), parts], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(folder: Path | None, key: str, make: Callable[[], Any]) -> Any:
    """Return the result of `make`, a JSON value, from the cache if it is there. Disk errors cost only time."""
    if folder is None:
        return make()
    path = folder / f"{key}.json"
    content = _read(path, key)
    if content is None:
        content = make()
        try:
            _write(path, key, content)
        except OSError as error:
            log.debug(f"{folder}: results are not cached ({error.strerror})")
    return content


def stored(folder: Path | None, key: str) -> Any:
    """Return the value stored under `key`, or None."""
    return None if folder is None else _read(folder / f"{key}.json", key)


def store(folder: Path | None, key: str, content: Any) -> None:
    """Keep `content`, which has to be JSON, in place of an earlier entry. Errors of the disk are ignored."""
    if folder is not None:
        try:
            _write(folder / f"{key}.json", key, content)
        except OSError as error:
            log.debug(f"{folder}: results are not cached ({error.strerror})")


def _read(path: Path, key: str) -> Any:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] == key and entry["checksum"] == _checksum(entry["content"]):
            with contextlib.suppress(OSError):  # of another user, or where nothing can be written
                os.utime(path)  # the oldest go by when they were last of use
            return entry["content"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not there, of another program, or damaged: made again either way
    return None


def _write(path: Path, key: str, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "checksum": _checksum(content), "content": content}, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    files = sorted(path.parent.glob("*.json"), key=lambda file_path: file_path.stat().st_mtime)
    for old in files[:-MOST_FILES]:
        old.unlink(missing_ok=True)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache
def _own_source() -> str:
    """Return a key of this state of the shim's code, which may change within a version: someone is at work on it."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
