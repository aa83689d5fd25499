"""Random numbers: every simulated device draws from a generator of its own, as CUDA devices do.

With one seed all devices begin at the same place, and what a device draws depends only on what it drew before. The
generators are torch's CPU generator (mt19937), so their numbers are not those of a CUDA device with the same seed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.types import Device

from ..virtual.machine import Machine
from .tensor import BACKEND

_Plain = torch._C.Generator  # torch's own class, also once `torch.Generator` is replaced
_made: set[int] = set()  # the insides of generators for simulated devices: operations get these in another object


class _Kind(type(_Plain)):  # type: ignore[misc]
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Plain)


class Generator(_Plain, metaclass=_Kind):
    """Stands in for `torch.Generator`, which cannot make a generator for a backend written in Python.

    For any other device it returns torch's own. Attribute `device`: the simulated device that it was made for.
    """

    _place: torch.device

    def __new__(cls, device: Device = None) -> Any:  # this class, or torch's
        requested = torch.device("cpu" if device is None else device)
        if requested.type != BACKEND:
            return _Plain(device=requested)
        self = super().__new__(cls)
        self._place = torch.device(BACKEND, 0) if requested.index is None else requested
        _made.add(_inside(self))
        return self

    def __init__(self, device: Device = None):
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._place

    def __del__(self) -> None:
        _made.discard(_inside(self))

    def clone_state(self) -> torch.Generator:
        copy: torch.Generator = Generator(self.device)
        copy.set_state(self.get_state())
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (str(self.device), self.get_state())


def _inside(generator: _Plain) -> int:
    inside: int = generator._cdata  # type: ignore[attr-defined]  # not in torch's stubs
    return inside


def _restored(device: str, state: torch.Tensor) -> torch.Generator:
    generator: torch.Generator = Generator(device)
    generator.set_state(state)
    return generator


class Generators:
    """The generators of the devices of one machine, in the order of their indices."""

    def __init__(self, count: int):
        self._lock = threading.RLock()
        self.each = tuple(Generator(torch.device(BACKEND, index)) for index in range(count))
        for generator in self.each:
            generator.manual_seed(torch.initial_seed())

    def checked(self, generator: torch.Generator | None, place: int) -> torch.Generator:
        """Return the generator that an operation on device `place` draws from, given its argument `generator`.

        Raises:
            RuntimeError: it is a generator of the host, worded as CUDA does.
        """
        if generator is None:
            return self.each[place]
        if _inside(generator) not in _made:
            raise RuntimeError(f"Expected a '{BACKEND}' device type for generator but found 'cpu'")
        return generator

    @contextlib.contextmanager
    def drawing(self, place: int) -> Iterator[None]:
        """Let operations on the host that take no generator draw from that of device `place`."""
        host, own = torch.default_generator, self.each[place]
        with self._lock:  # the replicas of DataParallel run in threads
            state = host.get_state()
            host.set_state(own.get_state())
            try:
                yield
            finally:
                own.set_state(host.get_state())
                host.set_state(state)


def functions(machine: Machine) -> dict[str, Callable[..., Any]]:
    """Return the functions of `torch.cuda.random` for the devices of `machine`; no device means the current one."""
    generators: tuple[Generator, ...] = machine.generators.each

    def of(device: Device = None) -> Generator:
        return generators[machine.index_of(device)]

    def manual_seed(seed: int) -> None:
        of().manual_seed(int(seed))

    def manual_seed_all(seed: int) -> None:  # torch.manual_seed calls this, too
        for generator in generators:
            generator.manual_seed(int(seed))

    def seed() -> None:
        of().seed()

    def seed_all() -> None:
        manual_seed_all(of().seed())

    def set_rng_state(new_state: torch.Tensor, device: Device = None) -> None:
        of(device).set_state(new_state)

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        for generator, state in zip(generators, new_states, strict=False):
            generator.set_state(state)

    return {
        "get_rng_state": lambda device=None: of(device).get_state(),
        "get_rng_state_all": lambda: [generator.get_state() for generator in generators],
        "set_rng_state": set_rng_state, "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed, "manual_seed_all": manual_seed_all,
        "seed": seed, "seed_all": seed_all, "initial_seed": lambda: of().initial_seed(),
    }  # fmt: skip
