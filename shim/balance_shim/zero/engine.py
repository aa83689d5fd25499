"""The Trainer under ZeRO-3: the checks once DeepSpeed's engine exists."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from .. import devices, log, state
from ..errors import ZeroError
from ..patching.guard import attempt
from ..training.actual_workload import checkpoints_already, innermost
from ..training_run import Part
from ..units import counted, format_size
from ..upstream.trainer import TrainerLike
from . import calls, given_optimizer, optimizer_state
from .divergence import cross_attention, desync, modality_sync
from .divergence.desync import DesyncDetector
from .weights import gradients, inference_models, state_dicts
from .weights.partitioned_parameter import look_whole

if TYPE_CHECKING:
    from torch import nn

_CHECKS: Part[bool] = Part("whether the engine will be checked", outlives=True)
_WATCH: Part[DesyncDetector] = Part("the watch over the ranks", outlives=True)
_STATE: Part[Any] = Part("the optimizer state of the training before", outlives=True)
_HOOKS: Part[list[Any]] = Part("hooks that have ranks run what others run", outlives=True)


def prepare(trainer: TrainerLike) -> None:
    """Have the engine checked as soon as training has been set up."""
    from transformers import TrainerCallback

    _dismantle(trainer)
    inference_models.take_down(trainer.model)
    given_optimizer.keep(trainer)
    if _CHECKS.of(trainer) is not None:  # it trains again
        return

    class ZeroCheck(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            check(trainer.model_wrapped)
            look_whole(trainer.model)  # adapters too, which are partitioned only now
            state_dicts.arm(trainer.model)
            calls.watch(innermost(trainer.model))
            gradients.arm(trainer)
            earlier = _STATE.of(trainer)
            if earlier is not None:
                action, instead = "going on with the optimizer state", "it begins with a new state"
                attempt(action, optimizer_state.give, trainer.model_wrapped, earlier, instead=instead)
                _STATE.keep(trainer, None)
            action = "watching for ranks that run different modules"
            watch = attempt(action, watch_of, trainer, instead="a hang will not be explained")
            if watch is not None:
                _WATCH.keep(trainer, watch)
            if _HOOKS.of(trainer) is None and args.world_size > 1:
                action = "having every rank run the towers that some rank needs"
                instead = "batches with pictures on some ranks only will hang"
                _HOOKS.keep(trainer, attempt(action, accompany, trainer.model, default=[], instead=instead))

    trainer.add_callback(ZeroCheck())
    _CHECKS.keep(trainer, True)


def check(engine: Any) -> None:
    """Compare DeepSpeed's engine with the request.

    Raises:
        ZeroError: it is not ZeRO-3, or not over all processes.
    """
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    if stage != 3:
        raise ZeroError(
            f"BALANCE_MODE=zero3: the Trainer trains with {_what(engine, stage)}, not with ZeRO-3 (report this with "
            "the output of `balance-shim doctor`)"
        )
    started = int(os.environ["WORLD_SIZE"])
    if engine.world_size != started:
        raise ZeroError(
            f"BALANCE_MODE=zero3: DeepSpeed sees {counted(engine.world_size, 'process')}, and {started} were started; "
            "each would train a model of its own (report this with the output of `balance-shim doctor`)"
        )
    log.once(
        "info",
        f"ZeRO-3 over {counted(started, 'process')}; each holds {format_size(share(engine.module))} of weights"
        + attempt("reading the device's memory", _outside_of_torch, default=""),
    )


def accompany(model: "nn.Module") -> list[Any]:
    """Have every rank run the parts of `model` that some rank's batch needs; returns the hooks that see to it."""
    return modality_sync.accompany(model) or cross_attention.accompany(innermost(model))


def watch_of(trainer: TrainerLike) -> DesyncDetector | None:
    """Return the watch over the ranks from this training on, evaluations behind it included; None for one rank."""
    if int(os.environ["WORLD_SIZE"]) < 2:
        return None
    return desync.start(trainer.model_wrapped, float(trainer.args.ddp_timeout))


def watched(trainer: TrainerLike, inputs: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context of one step of `trainer`. `inputs`: its batch."""
    watch = _WATCH.of(trainer)
    return contextlib.nullcontext() if watch is None else watch.watching(inputs)


def explain_out_of_memory(trainer: TrainerLike) -> None:
    """Log the remedies that make a training under ZeRO-3 smaller, cheapest first."""
    arguments, offload = trainer.args, state.settings().offload
    remedies = []
    if not checkpoints_already(trainer.model):
        remedies.append("gradient_checkpointing=True in the arguments")
    if arguments.per_device_train_batch_size > 1:
        remedies.append("a smaller per_device_train_batch_size with more gradient_accumulation_steps")
    remedies += {
        "none": ["BALANCE_OFFLOAD=optimizer", "BALANCE_OFFLOAD=all"],
        "optimizer": ["BALANCE_OFFLOAD=all"],
    }.get(offload, [])
    remedies.append("shorter sequences, or more devices")
    log.error_of_any_rank(f"out of memory under ZeRO-3; to reduce memory: {', then '.join(remedies)}")


def _outside_of_torch() -> str:
    """Return the memory of the first rank's device outside of torch (NCCL's part of it), as the end of a sentence."""
    kind = devices.accelerator_type()
    if kind is None:
        return ""
    import torch

    module: Any = torch.get_device_module(kind)
    free, total = module.mem_get_info()
    outside = max(0, total - free - module.memory_reserved())
    return f"; NCCL's buffers, the {kind} context and other processes hold {format_size(outside)} of its device"


def share(model: "nn.Module") -> int:
    """Return the bytes of the parameters of `model` that this process holds."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dismantle(trainer: TrainerLike) -> None:
    """Take down the engine of an evaluation or training before this one: the Trainer would take it for the new one."""
    engine = trainer.model_wrapped
    if engine is trainer.model or not hasattr(engine, "zero_optimization_stage"):
        return
    action, instead = "keeping the optimizer state", "a second training begins with a new state"
    earlier = attempt(action, optimizer_state.taken_from, engine, instead=instead)
    if earlier is not None:
        _STATE.keep(trainer, earlier)
    engine.destroy()
    trainer.model_wrapped, trainer.deepspeed = trainer.model, None
    trainer.accelerator.free_memory()


def _what(engine: Any, stage: int | None) -> str:
    return "no DeepSpeed engine" if stage is None else f"stage {stage}"
