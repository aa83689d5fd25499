"""Recognize an out-of-memory error, and read device, phase and module from the exception and its traceback.

Nothing is noted while training runs, so that a step costs nothing more.
"""

import re
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import devices
from ..units import MIB, parse_size
from .batch import BatchSize, size_of

if TYPE_CHECKING:
    from torch import nn

_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?(?:[KMGT]?i?B(?:ytes)?|bytes))")
# CUDA: "GPU 2 has a total capacity of"; NPU: "(NPU 2; 60.97 GiB total capacity"; simulated: "npu:2 has a total".
_DEVICE = re.compile(r"\b(?:GPU|NPU|XPU|cuda|npu|xpu)[ :](\d+)(?= has a total|; )", re.IGNORECASE)

# Words of errors that are nothing else, and of those that are where the device is full: libraries that cannot have
# their handle or workspace report it so.
_CERTAIN = ("out of memory", "blas_status_alloc_failed", "cudnn_status_alloc_failed", "rocblas_status_memory_error")
_WHEN_FULL = (
    "blas_status_not_initialized",
    "cudnn_status_internal_error",
    "cudnn_status_not_initialized",
    "no valid execution plans",
    "unable to find an engine to execute this computation",
)
FULL = 256 * MIB  # free for the driver; a cuBLAS or cuDNN handle with its workspace takes less


Phase = Literal["forward pass", "backward pass", "optimizer step", "gradient clipping", "evaluation", "training"]


class Place(NamedTuple):
    """Where and when memory ran out.

    Attributes:
        device: the index of the device, if the message has it.
        wanted: bytes of the failed request; 0 where the message does not name them.
        phase: "forward pass", "backward pass", "optimizer step", "gradient clipping", "evaluation", or "training".
        module: full name of the innermost module at work; "" where none was, as in most of a backward pass.
        batch: the micro-batch in work; all zero where it is not to be seen.
        inputs: that micro-batch itself, or None.
    """

    device: int | None
    wanted: int
    phase: Phase
    module: str
    batch: BatchSize
    inputs: Any = None


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether `failure` reports a full device; platforms word it differently, and some have a class for it."""
    import torch

    if isinstance(failure, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    if not isinstance(failure, RuntimeError):  # AcceleratorError of torch 2.8 is one
        return False
    text = str(failure).lower()
    return any(phrase in text for phrase in _CERTAIN) or (
        any(phrase in text for phrase in _WHEN_FULL) and _is_some_device_full()
    )


def _is_some_device_full() -> bool:
    """Whether the driver has next to nothing left on a device of this process; False where none can be asked."""
    import torch

    kind = devices.accelerator_type()
    if kind is None:
        return False
    module = torch.get_device_module(kind)
    for index in devices.in_use(kind):
        try:
            if module.mem_get_info(index)[0] < FULL:
                return True
        except RuntimeError:  # an error that sticks to the context is none of memory
            continue
    return False


def place_of(failure: BaseException, model: "nn.Module") -> Place:
    """Return where `failure`, an out-of-memory error, came from. `model` names the modules."""
    text = str(failure)
    requested, device = _WANTED.search(text), _DEVICE.search(text)
    phase, module, inputs = _read_frames(failure, model)
    return Place(
        None if device is None else int(device[1]),
        0 if requested is None else parse_size(requested[1].replace("ytes", "")),
        phase,
        module,
        size_of(inputs),
        inputs,
    )


def _read_frames(failure: BaseException, model: "nn.Module") -> tuple[Phase, str, Any]:
    """Return (phase, module, inputs of the micro-batch) from the call stack, outermost frame first."""
    import torch

    names = {id(module): name for name, module in model.named_modules()}
    phase: Phase = "training"
    module, inputs = "", None
    for frame in _frames(failure):
        function = frame.f_code.co_name
        this: Any = frame.f_locals.get("self")
        if function == "training_step" and "inputs" in frame.f_locals:
            inputs = frame.f_locals["inputs"]
        elif function in ("_run_epoch", "_inner_training_loop") and "inputs" in frame.f_locals:
            inputs = frame.f_locals["inputs"]  # what training_step has let go of before the backward pass
        elif function in ("evaluation_loop", "prediction_loop"):
            phase, inputs = "evaluation", None
        elif function == "prediction_step":
            inputs = frame.f_locals.get("inputs")
        elif function == "clip_grad_norm_":
            phase = "gradient clipping"
        elif function == "step" and isinstance(this, torch.optim.Optimizer):
            phase = "optimizer step"
        elif function == "backward" and _file(frame).endswith(("torch/_tensor.py", "torch/autograd/__init__.py")):
            phase = "backward pass"
        elif isinstance(this, torch.nn.Module) and id(this) in names:
            module = names[id(this)]
            phase = "forward pass" if phase == "training" else phase
        elif function == "compute_loss" and phase == "training":
            phase = "forward pass"
    return phase, module, inputs


def _frames(failure: BaseException) -> Iterator[FrameType]:
    traceback = failure.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")
