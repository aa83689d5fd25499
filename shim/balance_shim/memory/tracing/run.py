"""One training step of a traced model, and the bytes that each device held in it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...logits.head import deferring
from ...timing.recorder import Recorder
from ...upstream import fused_head
from ...upstream.model_ends import input_embedding
from ...versions import version_of
from ...virtual.machine import Machine
from ..recomputation import recompute_only
from ..workload import Workload
from . import ahead
from .autocast import CudaRules
from .errors import CannotTrace, TakesTooLong
from .machine import TooManyOperations
from .phases import autograd_clock, phases_of
from .plain_kernels import fuses_loss, plain_functions
from .result import Held

PREPARES = "prepare_decoder_input_ids_from_labels"
TRAINS_WITHOUT_CACHE = (5, 0)  # the Trainer then sets this very attribute; before, the cache fills up in training, too
CHECKPOINTS_WITHOUT_REENTRANCE = (5, 0)  # by default; before, scripts with frozen embeddings had to ask for gradients


def place_inputs(model: nn.Module, devices: Mapping[str, int], machine: Machine) -> None:
    """Bring to each module named in `devices` its inputs, as accelerate does at every module of a device map."""
    from accelerate.utils import send_to_device

    for name, index in devices.items():
        module = model.get_submodule(name)
        target = machine.devices[index]

        def arrive(args: Any, kwargs: Any, target: torch.device = target) -> Any:
            return send_to_device(args, target), send_to_device(kwargs, target)

        wrap_forward(module, arrive)


def wrap_forward(
    module: nn.Module, before: Callable[[Any, Any], tuple[Any, Any]], after: Callable[[], None] | None = None
) -> None:
    """Have `before` change the arguments of `module.forward`, and `after` called when it returns.

    Hooks would miss the models that call `module.forward` themselves; accelerate wraps the function, too.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            if after is not None:
                after()

    module.forward = wrapped


def training_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    workload: Workload,
    machine: Machine,
    supposed: bool = False,
    recomputed: Mapping[str, bool] | None = None,
) -> dict[int, Held]:
    """Run forward and backward of `model` and return the memory that each device held.

    Args:
        supposed: whether the trained parameters are assumed; then so are the calls by which scripts have them trained.
        recomputed: name of each layer that runs -> whether it recomputes its activations; None: as the workload has it.

    Raises:
        CannotTrace: the model fails in a dry run, or gives no loss to go backward from.
    """
    try:
        prepare(model, workload, supposed)
        if workload.loss == "fused":
            fused_head.ensure(model)
        if recomputed is not None:
            recompute_only(model, frozenset(name for name in recomputed if recomputed[name]), layers=list(recomputed))
        rules = CudaRules() if workload.autocast else contextlib.nullcontext()
        with plain_functions(model), fused_head.folded_in_place(), rules:
            return _training_step(model, batch, workload, machine)
    except CannotTrace:
        raise
    except TooManyOperations as error:
        raise TakesTooLong(f"{type(model).__name__} takes too long in a dry run ({error})") from error
    except (Exception, SystemExit) as error:  # a model may end the program over what it is fed with
        text = str(error).splitlines()[0] if str(error) else ""
        raise CannotTrace(f"{type(model).__name__} fails in a dry run ({type(error).__name__}: {text})") from error


def _training_step(model: nn.Module, batch: Mapping[str, Any], workload: Workload, machine: Machine) -> dict[int, Held]:
    if workload.accumulation > 1:  # the first micro-batch brings the gradients
        _backward(_forward(model, batch, workload, machine))
    before = live(machine)
    reset(machine)
    work = machine.watcher = Recorder()
    with machine.ledger.recording(autograd_clock) as record:
        loss = _forward(model, batch, workload, machine)
        forward, left = peaks(machine), live(machine)
        machine.ledger.settle()
        cut = len(record)
        reset(machine)
        work.backward = True
        _backward(loss)
        del loss
        backward = peaks(machine)
    machine.watcher = None
    phases = phases_of(record, cut)
    return {
        index: Held(
            forward=forward[index] - before[index],
            kept=left[index] - before[index],
            backward=backward[index] - before[index],
            ran=forward[index] > before[index],
            phases=tuple(phases.get(index, ())),
            work=work.work_of(index),
        )
        for index in range(len(machine.devices))
    }


def _backward(loss: torch.Tensor) -> None:
    if loss.requires_grad:  # not so for a part in which nothing trains
        # What `loss.backward()` comes down to. `CudaRules` would see that function and then not be on inside,
        # so that layers would be recomputed by other rules than they were computed by.
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def prepare(model: nn.Module, workload: Workload, supposed: bool) -> None:
    model.train()
    config: Any = getattr(model, "config", None)
    if config is not None and version_of("transformers") >= TRAINS_WITHOUT_CACHE:
        config.use_cache = False
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    if not workload.gradient_checkpointing:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        return  # where nothing is on, classes that only claim to support it may refuse to switch it off
    # Both kinds keep and recompute the same; this one also trains layers whose inputs need no gradients.
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    embedding = input_embedding(model)
    frozen = embedding is not None and not any(parameter.requires_grad for parameter in embedding.parameters())
    if supposed and frozen and version_of("transformers") < CHECKPOINTS_WITHOUT_REENTRANCE:
        model.enable_input_require_grads()  # type: ignore[operator]


def _forward(model: nn.Module, batch: Mapping[str, Any], workload: Workload, machine: Machine) -> torch.Tensor:
    """Return the loss, as `Trainer.compute_loss` does: by then nobody holds the other outputs."""
    from accelerate.utils import convert_outputs_to_fp32, send_to_device

    def call() -> Any:
        if workload.loss == "fused" and fused_head.of(model) is not None:
            # Trainers of preferences make the labels themselves, of the sequences that they join.
            made = {} if "labels" in batch else {"labels": batch["input_ids"].clone()}
            outputs = model(**batch, **made, fused_lm_head=True)
            return send_to_device(outputs, machine.devices[0])
        chunked = workload.loss == "chunked" or fuses_loss(model)
        with deferring(model) if chunked else contextlib.nullcontext():
            outputs = model(**batch)
        return send_to_device(outputs, machine.devices[0])  # where the inputs came from

    batch = ahead.fed(model, batch, workload, machine)
    labels = batch.pop("labels", None) if workload.label_smoothing else None
    if labels is not None and "decoder_input_ids" not in batch and hasattr(model, PREPARES):
        batch["decoder_input_ids"] = getattr(model, PREPARES)(labels)  # as the collator does that knows the model
    with _autocast(workload):
        if workload.autocast:
            call = convert_outputs_to_fp32(call)
        outputs = call()
        loss = _loss(outputs) if labels is None else _smoothed_loss(model, outputs, labels, workload)
    if not loss.requires_grad and any(parameter.requires_grad for parameter in model.parameters()):
        raise CannotTrace(f"{type(model).__name__} returns no loss with gradients")
    return loss


def evaluated(model: nn.Module, batch: Mapping[str, Any], workload: Workload, machine: Machine) -> tuple[Any, Any]:
    """Return loss and outputs of a batch that is evaluated, as `Trainer.prediction_step` has both at once."""
    from accelerate.utils import convert_outputs_to_fp32, send_to_device

    def call() -> Any:
        return send_to_device(model(**batch), machine.devices[0])

    batch = ahead.fed(model, batch, workload, machine)
    labels = batch.pop("labels", None) if workload.label_smoothing else None
    if labels is not None and "decoder_input_ids" not in batch and hasattr(model, PREPARES):
        batch["decoder_input_ids"] = getattr(model, PREPARES)(labels)
    with CudaRules() if workload.autocast else contextlib.nullcontext(), _autocast(workload):
        outputs = convert_outputs_to_fp32(call)() if workload.autocast else call()
        loss = None if labels is None else _smoothed_loss(model, outputs, labels, workload)
    return loss, outputs


def _smoothed_loss(model: nn.Module, outputs: Any, labels: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Return the loss that the Trainer itself computes, where the logits have come back to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer_pt_utils import LabelSmoother

    shifts = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    loss: torch.Tensor = LabelSmoother(epsilon=workload.label_smoothing)(outputs, labels, shift_labels=shifts)
    return loss


def _loss(outputs: Any) -> torch.Tensor:
    """Return the loss; of a part of a model, which has none, something to go backward from that costs nothing."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is None:
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        values = [outputs] if isinstance(outputs, torch.Tensor) else values
        loss = next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)
    if loss is None:
        raise CannotTrace("its outputs contain no loss")
    return loss if loss.dim() == 0 else loss.sum()


@contextlib.contextmanager
def _autocast(workload: Workload) -> Iterator[None]:
    if workload.autocast:
        with torch.autocast("cpu", dtype=getattr(torch, workload.autocast_dtype)):
            yield
    else:
        yield


def live(machine: Machine) -> list[int]:
    return [usage.live for usage in machine.ledger.usage()]


def peaks(machine: Machine) -> list[int]:
    return [usage.peak for usage in machine.ledger.usage()]


def reset(machine: Machine) -> None:
    for index in range(len(machine.devices)):
        machine.ledger.reset_peak(index)
