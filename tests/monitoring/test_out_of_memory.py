"""Where memory ran out, read from exceptions of several platforms and from tracebacks."""

from types import SimpleNamespace

import pytest
import torch

from balance_shim import devices
from balance_shim.monitoring.out_of_memory import is_out_of_memory, place_of

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 23.69 GiB of which "
    "1.12 GiB is free. Including non-PyTorch memory, this process has 22.5 GiB memory in use."
)
NPU = "NPU out of memory. Tried to allocate 20.00 MiB (NPU 5; 60.97 GiB total capacity; 59.10 GiB already allocated)"
FEW = (
    "CUDA out of memory. Tried to allocate 512 bytes. GPU 0 has a total capacity of 23.69 GiB of which 0 bytes is free."
)
XPU = "XPU out of memory. Tried to allocate 512.00 KiB. GPU 1 has a total capacity of 48.00 GiB."
MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))


def error_of(function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as failure:
        return failure
    raise AssertionError("nothing was raised")


def fail(*_):
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("text", "device", "wanted"), [(CUDA, 3, 2 << 30), (NPU, 5, 20 << 20), (XPU, 1, 512 << 10), (FEW, 0, 512)]
)
def test_the_words_of_each_platform(text, device, wanted):
    """Device and request are read from what CUDA, NPU and XPU say."""
    place = place_of(RuntimeError(text), MODEL)
    assert (place.device, place.wanted) == (device, wanted)
    assert is_out_of_memory(RuntimeError(text))


def test_what_is_out_of_memory_and_what_is_not():
    """The class, the words in a RuntimeError, and cuBLAS's own; not a host's MemoryError, nor other errors."""
    assert is_out_of_memory(torch.OutOfMemoryError("no words"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("Expected all tensors to be on the same device"))
    assert not is_out_of_memory(MemoryError("out of memory"))


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
     "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "HIP error: HIPBLAS_STATUS_ALLOC_FAILED"],
)  # fmt: skip
def test_errors_that_are_nothing_else(text):
    """The driver's and the libraries' own words, as AcceleratorError and as RuntimeError."""
    assert is_out_of_memory(RuntimeError(text))
    if hasattr(torch, "AcceleratorError"):
        assert is_out_of_memory(torch.AcceleratorError(text, 2))


@pytest.mark.parametrize(
    "text",
    ["CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
     "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
     "cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.",
     "GET was unable to find an engine to execute this computation"],
)  # fmt: skip
def test_errors_that_are_out_of_memory_on_a_full_device(monkeypatch, text):
    """A library that cannot have its handle names no memory: it counts where some device has next to none."""
    free = [20 << 30, 20 << 30]
    module = SimpleNamespace(mem_get_info=lambda index: (free[index], 24 << 30), device_count=lambda: 2)
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(devices, "in_use", lambda kind: (0, 1))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    assert not is_out_of_memory(RuntimeError(text))
    free[1] = 100 << 20
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))


def test_the_innermost_module_of_a_forward_pass():
    """The module at work is named in full, and the phase is forward."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    model[1][1].register_forward_pre_hook(fail)
    place = place_of(error_of(model, torch.ones(1, 2)), model)
    assert (place.phase, place.module) == ("forward pass", "1.1")


def test_a_backward_pass_has_no_module_unless_something_is_recomputed():
    """autograd's engine does not say which module; a layer that is recomputed does."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    out = model(torch.ones(1, 2))
    out.register_hook(fail)
    place = place_of(error_of(out.sum().backward), model)
    assert (place.phase, place.module) == ("backward pass", "")

    out = torch.utils.checkpoint.checkpoint(model[1], model[0](torch.ones(1, 2)), use_reentrant=False)
    model[1].register_forward_pre_hook(fail)
    place = place_of(error_of(out.sum().backward), model)
    assert (place.phase, place.module) == ("backward pass", "1")


def test_the_optimizers_step():
    """A failure under an optimizer's step is told by its frame."""

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            fail()

    place = place_of(error_of(Optimizer(MODEL.parameters(), lr=0.1).step), MODEL)
    assert (place.phase, place.module) == ("optimizer step", "")


def test_the_batch_is_found():
    """The micro-batch of the training step that failed is measured, where it is still to be seen."""

    def training_step(inputs):
        fail()

    place = place_of(error_of(training_step, {"input_ids": torch.ones(3, 7, dtype=torch.long)}), MODEL)
    assert (place.batch.batch_size, place.batch.seq_len, place.batch.bytes) == (3, 7, 168)
    assert place_of(error_of(fail), MODEL).batch.tokens == 0
