"""Which kernel `scaled_dot_product_attention` runs, as torch dispatches it on CUDA and ROCm.

Three of the four kernels keep their inputs, the output and one float32 a row for the backward pass. The fourth, plain
matrix products ("math"), keeps the S x S matrix of probabilities of every head, in float32 also for half types.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.13; older versions back to 2.5 differ only in
which of the first three they prefer.
"""

import contextlib
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from .kinds import Architecture

Kernel = Literal["flash", "cudnn", "efficient", "math"]

_HALF = (torch.float16, torch.bfloat16)
_FLASH_WIDEST = 256  # check_head_dim_size_flash
_CUDNN_WIDEST = 128  # check_cudnn_tensor_shapes; 256 on some architectures and versions, where flash takes over
_OLDEST_FUSED_HALF = (8, 0)  # check_sm_version<sm80, sm121>, of flash and cuDNN
_NEWEST = (12, 1)
_OLDEST_EFFICIENT = (5, 0)
_SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # flash trains few heads that are wider than 192 on these
_ROCM_FUSED = ((9, 0), (9, 4), (9, 5), (11, 0), (12, 0))  # gfx90a, gfx94x, gfx95x, gfx110x, gfx120x: AOTriton


class AttentionCall(NamedTuple):
    """The properties of a call that torch decides by.

    Attributes:
        dtype: of query, key and value.
        query_heads, key_heads: how many; fewer of the latter work with `enable_gqa` only.
        width, value_width: of a head, of query and key, and of value.
        has_mask: whether a mask or bias is given; `is_causal` is none.
        enable_gqa: whether torch is told that keys and values have fewer heads.
        dropout: its probability.
        is_causal: whether torch masks the future itself.
        is_square: whether there are as many queries as keys.
        requires_grad: whether a backward pass will follow.
        dimensions: of the tensors; B, H, S, D are four.
    """

    dtype: torch.dtype
    query_heads: int
    key_heads: int
    width: int
    value_width: int
    has_mask: bool = False
    enable_gqa: bool = False
    dropout: float = 0.0
    is_causal: bool = False
    is_square: bool = True
    requires_grad: bool = True
    dimensions: int = 4


class EnabledKernels(NamedTuple):
    """Which kernels the process lets torch use (`torch.backends.cuda.enable_flash_sdp` and its like)."""

    flash: bool = True
    efficient: bool = True
    cudnn: bool = True

    @classmethod
    def now(cls) -> "EnabledKernels":
        """Return the switches as they are set in this process."""
        cuda = torch.backends.cuda
        cudnn = getattr(cuda, "cudnn_sdp_enabled", lambda: True)()
        return cls(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cudnn)


def kernel_for(call: AttentionCall, architecture: Architecture, enabled: EnabledKernels | None = None) -> Kernel:
    """Return the kernel that torch chooses; for kinds of devices whose choice is not known, a fused one.

    Which of the fused kernels it is depends on the version of cuDNN, too, and makes no difference in what is kept.
    """
    if architecture.runtime not in ("cuda", "hip"):
        return "flash"
    enabled = enabled or EnabledKernels()
    if call.dimensions == 4:
        if enabled.flash and _flash(call, architecture):
            return "flash"
        if enabled.cudnn and _cudnn(call, architecture):
            return "cudnn"
        if enabled.efficient and _efficient(call, architecture):
            return "efficient"
    return "math"


def chosen_by_torch(call: AttentionCall, device: "torch.device") -> Kernel:
    """Return the kernel that torch chooses on a real CUDA or ROCm device, which it is asked with tiny tensors.

    Raises:
        RuntimeError: torch has no kernel for such tensors, or the device cannot be used.
    """
    rows, columns = (8, 8) if call.is_square else (8, 16)

    def made(heads: int, length: int, width: int) -> torch.Tensor:
        shape = (1, heads, length, width)[4 - call.dimensions :]
        return torch.zeros(shape, dtype=call.dtype, device=device, requires_grad=call.requires_grad)

    query = made(call.query_heads, rows, call.width)
    key, value = made(call.key_heads, columns, call.width), made(call.key_heads, columns, call.value_width)
    mask = torch.zeros((rows, columns), dtype=call.dtype, device=device) if call.has_mask else None
    if mask is not None:
        mask = mask.expand(1, 1, rows, columns)
    choice = torch._fused_sdp_choice(query, key, value, mask, call.dropout, call.is_causal, enable_gqa=call.enable_gqa)
    return _NAMES.get(int(choice), "math")


_NAMES: dict[int, Kernel] = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # c10's SDPBackend


def decided(call: AttentionCall, architecture: Architecture) -> Kernel:
    """Return the kernel by torch's own word where a device of that architecture is in use here, else by the rule."""
    return _decided(call, architecture, EnabledKernels.now())


@lru_cache(maxsize=1024)
def _decided(call: AttentionCall, architecture: Architecture, enabled: EnabledKernels) -> Kernel:
    # An out-of-memory, or a combination that torch refuses: the training will tell.
    with contextlib.suppress(Exception):
        device = _device_like(architecture)
        if device is not None:
            return chosen_by_torch(call, device)
    return kernel_for(call, architecture, enabled)


def _device_like(architecture: Architecture) -> "torch.device | None":
    """Return a real device of this architecture on which this process has a context already; None if there is none."""
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    if has_context is None or not torch.cuda.is_available():  # builds for the CPU
        return None
    if architecture.runtime != ("hip" if torch.version.hip else "cuda"):
        return None
    for index in range(torch.cuda.device_count()):
        if has_context(index) and torch.cuda.get_device_capability(index) == architecture.capability:
            return torch.device("cuda", index)
    return None


def _heads_match(call: AttentionCall, takes_gqa: bool) -> bool:
    if call.enable_gqa and takes_gqa:
        return call.query_heads % call.key_heads == 0
    return call.query_heads == call.key_heads


def _flash(call: AttentionCall, architecture: Architecture) -> bool:
    narrow = call.width == call.value_width <= _FLASH_WIDEST
    if call.has_mask or call.dtype not in _HALF or not narrow or not _heads_match(call, takes_gqa=True):
        return False
    if call.is_causal and not call.is_square:
        return False
    if architecture.runtime == "hip":
        return architecture.capability in _ROCM_FUSED
    trains_wide = call.requires_grad and call.width > 192
    if trains_wide and architecture.capability in _SMALL_SHARED_MEMORY and (call.width <= 224 or call.dropout > 0):
        return False
    return _half_is_fused(architecture)


def _cudnn(call: AttentionCall, architecture: Architecture) -> bool:
    if architecture.runtime != "cuda" or call.dtype not in _HALF or not _half_is_fused(architecture):
        return False
    widest = max(call.width, call.value_width)
    aligned = call.width % 8 == 0 == call.value_width % 8
    return aligned and widest <= _CUDNN_WIDEST and _heads_match(call, takes_gqa=True)


def _efficient(call: AttentionCall, architecture: Architecture) -> bool:
    # torch's main branch takes grouped queries here since pytorch#191085; no release up to 2.13 does.
    if not _heads_match(call, takes_gqa=False):
        return False
    if architecture.runtime == "hip":
        return architecture.capability in _ROCM_FUSED and call.dtype in (*_HALF, torch.float32)
    capability = architecture.capability or _OLDEST_FUSED_HALF
    dtypes = (*_HALF, torch.float32) if capability >= _OLDEST_FUSED_HALF else (torch.float16, torch.float32)
    if call.dtype not in dtypes or not _OLDEST_EFFICIENT <= capability <= _NEWEST:
        return False
    alignment = _gemm_alignment(call.dtype, capability)
    return call.width % alignment == 0 == call.value_width % alignment


def _gemm_alignment(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Return the number of elements that rows have to be a multiple of (minimum_gemm_alignment)."""
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and dtype in _HALF)
    if tensor_cores:
        return max(4 if capability >= (8, 0) else 1, 16 // dtype.itemsize)
    return 1


def _half_is_fused(architecture: Architecture) -> bool:
    return _OLDEST_FUSED_HALF <= (architecture.capability or _OLDEST_FUSED_HALF) <= _NEWEST
