"""States of random generators on the host, saved and restored: same seed, same losses."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any


def host_states() -> tuple[Any, Any, Any]:
    """Return the states of the generators of Python, numpy (None where it is not imported) and torch."""
    import torch

    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy else None, torch.get_rng_state()


def restore(states: tuple[Any, Any, Any]) -> None:
    """Give the generators the states that `host_states` returned."""
    import torch

    of_python, of_numpy, of_torch = states
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)
    torch.set_rng_state(of_torch)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the generators of the host after code that must not consume random numbers."""
    states = host_states()
    try:
        yield
    finally:
        restore(states)
