"""The base of modes in which the ranks of a machine share its devices: each places its model on its own share."""

import os
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

from .. import log, state
from ..errors import BalanceError
from ..patching.guard import attempt
from ..placement import placed_models
from ..replicas import preparation, rank_device, ranks, together
from ..upstream.trainer import TrainerLike
from ..zero.ranks import LAUNCHER_PROCESS
from .base import Original
from .device_maps import DeviceMaps, is_covered


class SharedDevices(DeviceMaps):
    """Gives models of several ranks a device map on the rank's share, and has accelerate train them as replicas."""

    def training_is_near(self) -> None:
        """Become several processes, as many as `BALANCE_REPLICAS` asks for."""
        if state.is_pending() or state.settings().replicas == 1:
            return
        from . import replica_launch

        try:
            replica_launch.ensure_launched()
        except BalanceError as error:
            state.postpone(error)  # to where arguments or a model are made, which ends the program

    def load(self, original: Original, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load with a device map where that is ours to make.

        Raises:
            BalanceError: replicas are asked for and cannot be started.
        """
        if is_covered(kwargs.get("device_map")):
            self.training_is_near()  # a loop without `TrainingArguments`
            state.raise_pending()
        return super().load(original, cls, args, kwargs)

    def has_own_devices(self) -> bool:
        """Return whether this process has all devices, or a share of them."""
        return ranks.has_own_devices()

    def before_trainer(self, init: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a placed model on its devices, and inputs on the first of them."""
        action, instead = "bringing inputs to this rank's devices", "they go to the device of its number"
        attempt(action, _correct_arguments, init, args, kwargs, instead=instead)
        super().before_trainer(init, args, kwargs)

    def begin(self, trainer: TrainerLike) -> None:
        """Plan for the real workload; tell a user who has started no ranks how many sequences a step has now."""
        super().begin(trainer)
        arguments = trainer.args
        if LAUNCHER_PROCESS in os.environ and arguments.world_size > 1:
            batch_size, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
            log.once(
                "info",
                f"{arguments.world_size} replicas, each with micro-batches of {batch_size} and accumulation "
                f"{accumulation}: {arguments.world_size * batch_size * accumulation} sequences per step",
            )

    def after_checkpoint(self) -> None:
        """Wait for the writer: a rank that misses it loads no best weights in the end, and the others wait for it."""
        if ranks.own_share() is not None:
            together.meet()

    def after_device_choice(self, partial_state: Any) -> None:
        """Keep inputs on a device of this rank's share."""
        action, instead = "bringing inputs to this rank's devices", "they go to the device of its number"
        attempt(action, rank_device.correct_state, partial_state, instead=instead)

    def preparing(self, objects: tuple[Any, ...]) -> AbstractContextManager[Any]:
        """Have accelerate accept maps of ours in several processes."""
        return preparation.maps_allowed() if any(map(_is_replica, objects)) else nullcontext()

    def prepare_model(self, original: Original, accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave a model on its devices when it becomes one of several replicas."""
        if _is_replica(args[0] if args else kwargs.get("model")):
            return preparation.prepare_placed(original, accelerator, args, kwargs)
        return original(accelerator, *args, **kwargs)


def _correct_arguments(init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = signature(init).bind_partial(*args, **kwargs).arguments.get("args")
    if arguments is not None:
        rank_device.correct_arguments(arguments)


def _is_replica(model: Any) -> bool:
    """Whether `model`, or one inside of it, was placed on a share of the devices; or is the copy of such a model."""
    if ranks.world_size(os.environ) == 1 or not hasattr(model, "modules"):
        return False
    return placed_models.placed(model) is not None or preparation.is_within_share(model)
