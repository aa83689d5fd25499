"""Micro-batches of the step under way, and how one is run again from where it began."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from .. import devices, rng
from ..upstream.trainer import TrainerLike

Perform = Callable[[Any], Any]


class MicroBatch(NamedTuple):
    """A micro-batch of the step under way: its inputs, and the random state before it."""

    inputs: Any
    randomness: tuple[Any, ...]


class Step:
    """The optimizer step that a trainer is in."""

    def __init__(self) -> None:
        self.done: list[MicroBatch] = []
        self.repairs = 0


def remembered(inputs: Any) -> MicroBatch:
    """Return a record of `inputs` and of the random state now."""
    return MicroBatch(_shallow(inputs), _random_state())


def _shallow(inputs: Any) -> Any:
    """Return the inputs in a container of their own, from which a trainer may take labels out."""
    return inputs.copy() if isinstance(inputs, Mapping) and hasattr(inputs, "copy") else inputs


def _random_state() -> tuple[Any, ...]:
    """Return the states of all generators that a step may draw from: a few kilobytes of host memory."""
    import torch

    module: Any = torch.get_device_module(devices.accelerator_type())
    on_devices = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else None
    return rng.host_states(), on_devices


def _restore(states: tuple[Any, ...]) -> None:
    import torch

    on_host, on_devices = states
    rng.restore(on_host)
    if on_devices is not None:
        torch.get_device_module(devices.accelerator_type()).set_rng_state_all(on_devices)


def run_again(perform: Perform, batch: MicroBatch) -> Any:
    """Return `perform` of the inputs of `batch`, with the random state that was before it."""
    _restore(batch.randomness)
    return perform(_shallow(batch.inputs))


@contextmanager
def within_a_step(trainer: TrainerLike) -> Iterator[None]:
    """Have micro-batches know that the one that runs is not the last of its step."""
    held = trainer.accelerator.gradient_state
    before = held.sync_gradients
    held._set_sync_gradients(False)
    try:
        yield
    finally:
        held._set_sync_gradients(before)
