"""Parameters of which some commands run a sample."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(names: Iterable[str], *sample: str, mark: str = "exhaustive") -> list[Any]:
    """Return `names` as parameters of a test, all but `sample` with the mark (`exhaustive` or `sweep`)."""
    names = list(names)
    unknown = set(sample) - set(names)
    assert not unknown, f"not among the parameters: {sorted(unknown)}"
    return [name if name in sample else pytest.param(name, marks=getattr(pytest.mark, mark)) for name in names]
