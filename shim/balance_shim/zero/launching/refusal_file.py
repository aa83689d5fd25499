"""The line with which a rank was refused, left in a file for the launcher: all ranks are refused alike.

Standard library only: `sys.excepthook` writes it.
"""

from __future__ import annotations

import os

FOLDER = "BALANCE_SHIM_NOTES"  # the variable in which the launcher names the folder that it shares with its ranks


def path(folder: str, rank: int | str) -> str:
    """Return where a rank leaves its line."""
    return os.path.join(folder, f"{rank}.refused")


def leave(message: str) -> bool:
    """Leave `message` for the launcher to show once; return whether there is one that will."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    try:
        with open(path(folder, os.environ.get("RANK", "0")), "w", encoding="utf-8") as file:
            file.write(message)
    except OSError:
        return False
    return True
