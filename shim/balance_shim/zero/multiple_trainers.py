"""Several trainers in one program: accelerate keeps one state for all, with the DeepSpeed config of one of them.

Arguments that are made before another trainer is would get an error of accelerate's there, and a trainer that trains
after another one has been made would do so with that one's config.
"""

from typing import Any

from ..training_run import Part
from ..upstream.trainer import TrainerLike

_STATE: Part[dict[str, Any]] = Part("the state of accelerate", outlives=True)


def make_room(trainer: TrainerLike) -> None:
    """Have `trainer`, which is about to make its accelerator, find no other trainer's config, nor its own from there.

    accelerate refuses a second accelerator with a plugin, also for the same arguments.
    """
    from accelerate.state import AcceleratorState

    state = AcceleratorState._shared_state
    plugin = state.get("deepspeed_plugins", state.get("deepspeed_plugin"))
    if plugin is not None:
        AcceleratorState._reset_state()


def remember(trainer: TrainerLike) -> None:
    """Keep the state as it is now that `trainer` has made its accelerator."""
    from accelerate.state import AcceleratorState

    _STATE.keep(trainer, dict(AcceleratorState._shared_state))


def take_over(trainer: TrainerLike) -> None:
    """Have the state be that of `trainer`, which is about to train or evaluate."""
    from accelerate.state import AcceleratorState

    accelerator_state = _STATE.of(trainer)
    if accelerator_state is not None:
        AcceleratorState._shared_state.update(accelerator_state)
        trainer.args.deepspeed_plugin.set_deepspeed_weakref()
