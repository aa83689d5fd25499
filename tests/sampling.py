"""Parameters of which `make test` runs a sample and `make test-all` runs all."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(names: Iterable[str], *sample: str) -> list[Any]:
    """Return `names` as parameters of a test, all but `sample` marked `exhaustive`."""
    names = list(names)
    unknown = set(sample) - set(names)
    assert not unknown, f"not among the parameters: {sorted(unknown)}"
    return [name if name in sample else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]
