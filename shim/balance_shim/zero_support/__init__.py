"""Combinations that train or are refused under ZeRO-3, as data, with all their messages.

The code that refuses a combination raises `refusal(key, ...)`; one that trains with a note logs `sentence(key, ...)`.
`docs/zero3-support.md` is generated from the table by `docs/generate.py`, and
`tests/zero/test_support.py` walks it. Standard library only: part of it is raised before torch is imported.
"""

from ..errors import ZeroError
from . import configuration, launching, models, training
from .combination import AREAS, Area, Combination, Outcome

__all__ = ["AREAS", "TABLE", "Area", "Combination", "Outcome", "refusal", "sentence"]

# In the order of the page.
TABLE: dict[str, Combination] = {
    combination.key: combination for combination in (*launching.ROWS, *configuration.ROWS, *models.ROWS, *training.ROWS)
}


def refusal(key: str, **values: object) -> ZeroError:
    """Return the error that refuses the combination `key`; see `sentence`."""
    return ZeroError(f"BALANCE_MODE=zero3: {sentence(key, **values)}")


def sentence(key: str, **values: object) -> str:
    """Return the line of the combination `key`, with `values` for the fields of its message.

    Raises:
        KeyError: there is no such combination, or its message has another field.
    """
    return TABLE[key].message.format_map(values)
