"""The monitor's files: their folder, and the record in JSON lines, flushed after each step."""

import json
import os
from contextlib import suppress
from typing import IO, Any

from .. import log


def folder_for(report: str, output_dir: str) -> str:
    """Return the folder for the files of a training: that of `BALANCE_REPORT`, else the Trainer's own."""
    return output_dir if report in ("text", "off") else report


def free_name(folder: str, stem: str, ending: str) -> str:
    """Return the path of a file that is not there yet: `stem.ending`, else `stem-2.ending`, and so on."""
    number = 1
    while True:
        path = os.path.join(folder, f"{stem}{f'-{number}' if number > 1 else ''}.{ending}")
        if not os.path.lexists(path):
            return path
        number += 1


class Lines:
    """A file of JSON lines that is made with the first one. A disk that fails ends it, with one warning."""

    def __init__(self, folder: str, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._file: IO[str] | None = None
        self._failed = False
        self.path = ""

    def add(self, entry: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            if self._file is None:
                os.makedirs(self._folder, exist_ok=True)
                self.path = free_name(self._folder, self._stem, "jsonl")
                self._file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115, it stays open
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()  # a run that is killed keeps its lines
        except OSError as error:
            self._failed = True
            log.warning(f"{self.path or self._folder}: cannot be written ({error.strerror}); the record ends here")

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing tries once more to write what could not be written
                self._file.close()
